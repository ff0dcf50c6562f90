"""The loss as a module: gradscope sees loss, output and target without scope.log."""

import sys

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import gradscope


def main(log_dir: str = "runs/criterion", steps: int = 200) -> gradscope.Report:
    torch.manual_seed(0)
    diabetes = load_diabetes()
    features = torch.tensor(diabetes.data, dtype=torch.float32) * 20
    targets = torch.tensor(diabetes.target, dtype=torch.float32).unsqueeze(1)
    targets = (targets - targets.mean()) / targets.std()

    model = nn.Sequential(
        nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion = nn.MSELoss()

    with gradscope.watch(model, optimizer, criterion, log_dir=log_dir) as scope:
        for _ in range(steps):
            drawn = torch.randint(len(features), (32,))
            loss = criterion(model(features[drawn]), targets[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return scope.report()


if __name__ == "__main__":
    report = main(sys.argv[1]) if len(sys.argv) > 1 else main()
    report.print()
    print(report.run.signals.frame().tail())
