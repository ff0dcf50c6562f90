"""Updates written by hand: scope.step() says when the gradients are complete."""

import sys

import torch
from torch import Tensor, nn

import gradscope


def rosenbrock(point: Tensor) -> Tensor:
    x, y = point
    height: Tensor = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return height


class Point(nn.Module):
    """Two coordinates, to be moved to the minimum at (1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.tensor([-1.2, 1.0]))

    def forward(self) -> Tensor:
        """The height at the point."""
        return rosenbrock(self.position)


def main(log_dir: str = "runs/no-optimizer", steps: int = 300) -> gradscope.Report:
    model = Point()
    with gradscope.watch(model, log_dir=log_dir, every=1) as scope:
        for _ in range(steps):
            loss = model()
            loss.backward()
            scope.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=1e-3)
                        parameter.grad = None
            scope.log(distance=(model.position.detach() - 1).norm())
    return scope.report()


if __name__ == "__main__":
    report = main(sys.argv[1]) if len(sys.argv) > 1 else main()
    report.print()
    print(report.run.parameters.frame().tail())
