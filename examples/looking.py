"""Two learning rates, looked at: TensorBoard, figures, Markdown, and one page for both."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradscope


def train(learning_rate: float, log_dir: Path, steps: int = 120) -> gradscope.Report:
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)

    with gradscope.watch(model, optimizer, log_dir=log_dir, every=2) as scope:
        # Any model has the same few tags; single layers get theirs when asked for.
        scope.tensorboard(layers="*.weight", histograms="0.weight", margin_charts=True)
        for _ in range(steps):
            drawn = torch.randint(len(pixels), (64,))
            loss = nn.functional.cross_entropy(model(pixels[drawn]), labels[drawn])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss)
    return scope.report()


def main(log_dir: str = "runs/looking") -> None:
    folder = Path(log_dir)
    reports = {name: train(float(name), folder / name) for name in ("0.1", "10")}

    report = reports["10"]
    report.write(folder / "report.md")  # for an issue or a pull request
    figure = gradscope.figures.update_ratio(report.run, findings=report.findings)
    figure.savefig(folder / "updates.pdf")
    print(report.run.parameters.frame("update_ratio").tail())

    print(f"Both on one page:  gradscope report {folder}/0.1 {folder}/10 -o both.html")
    print(f"TensorBoard:       tensorboard --logdir {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
