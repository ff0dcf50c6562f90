"""A plain training loop, watched: digits, a small convolutional net, AdamW."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradscope


def main(log_dir: str = "runs/plain-loop", steps: int = 100) -> gradscope.Report:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    with gradscope.watch(model, optimizer, log_dir=log_dir) as scope:
        for _ in range(steps):
            drawn = torch.randint(len(images), (64,))
            outputs = model(images[drawn])
            loss = nn.functional.cross_entropy(outputs, labels[drawn])
            loss.backward()
            scope.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            accuracy = (outputs.argmax(1) == labels[drawn]).float().mean()
            scope.log(loss=loss, accuracy=accuracy)
    return scope.report()


if __name__ == "__main__":
    report = main(sys.argv[1]) if len(sys.argv) > 1 else main()
    report.print()
    print(report.run.parameters.frame().tail())
