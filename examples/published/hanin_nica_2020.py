"""Hanin & Nica 2020: how much the gradients of ReLU nets differ from net to net.

With He's variance of 2 / fan-in the squared norm G of a gradient is kept on average over nets. In
a single net it isn't: each layer multiplies it by a random number around 1, so that ln G is
about normal, with

    variance 5 Σ 1/n   and mean −½ of that,

n the widths of the layers. A net as deep as wide is a lottery ticket, whatever the initialization.
That is to the first order in 1/n: nets of width 32 and this depth differ by more.

    python examples/published/hanin_nica_2020.py [picture.png]
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradscope.comparison.meanfield import log_variance, moments
from gradscope.comparison.quadrature import F64
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

DEPTH = 50
WIDTHS = (32, 64, 128)
# Nets at a time: their weights are all in memory.
_TOGETHER = 100


@dataclass(frozen=True)
class Measured:
    """log_gain: (nets, layers), ln of the squared norm after so many layers over that before."""

    width: int
    log_gain: F64

    @property
    def published(self) -> F64:
        """5 Σ 1/n, after each layer."""
        layers = self.log_gain.shape[1]
        return np.array([5 * passed / self.width for passed in range(1, layers + 1)])

    @property
    def theory(self) -> float:
        """What gradscope says of the whole depth, from the moments of ReLU."""
        kurtosis = moments("relu").kurtosis
        return log_variance(kurtosis, [self.width] * self.log_gain.shape[1])

    @property
    def variance(self) -> F64:
        """Over nets, after each layer."""
        found: F64 = self.log_gain.var(axis=0, ddof=1)
        return found

    @property
    def error(self) -> float:
        """The standard error of the last variance, with the fourth moment that it has."""
        last = self.log_gain[:, -1] - self.log_gain[:, -1].mean()
        fourth = float((last**4).mean() - (last**2).mean() ** 2)
        return math.sqrt(fourth / last.size)


def log_gains(width: int, nets: int, generator: torch.Generator) -> F64:
    """Of `nets` nets at once; each has its own weights, input and cotangent."""
    scale = math.sqrt(2 / width)
    values = torch.randn(nets, width, 1, generator=generator)
    seen = [values]
    weights = [
        scale * torch.randn(nets, width, width, generator=generator) for _ in range(DEPTH - 1)
    ]
    for weight in weights:
        seen.append(weight @ seen[-1].relu())
    gradient = torch.randn(nets, width, 1, generator=generator)
    norms = [gradient.square().sum((1, 2))]
    for weight, before in zip(reversed(weights), reversed(seen[:-1]), strict=True):
        gradient = (weight.mT @ gradient) * (before > 0)
        norms.append(gradient.square().sum((1, 2)))
    found: F64 = torch.stack(norms, 1).double().log().numpy()
    return found[:, 1:] - found[:, :1]


def draw(found: dict[int, Measured], picture: str | Path) -> None:
    with drawing(LIGHT):
        figure, axes = new_figure(3.4)
        colours = (LIGHT.nonfinite, LIGHT.last, LIGHT.line)
        for own, colour, mark in zip(found.values(), colours, "s^o", strict=False):
            passed = np.arange(1, own.variance.size + 1)
            axes.plot(passed, own.published, c=colour, lw=1.2, label=f"5 Σ 1/n, n = {own.width}")
            axes.plot(
                passed[3::5], own.variance[3::5], mark, c=colour, ms=5,
                label=f"measured, n = {own.width}",
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layers that the gradient has passed")
        axes.set_ylabel("variance of ln ‖gradient‖²")
        level_lines(axes, LIGHT)
        titled(axes, "Hanin & Nica 2020: ReLU nets with He initialization, over nets")
        legend(axes, own=False)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(picture: str | Path | None = None, *, nets: int = 600) -> dict[int, Measured]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    print(f"{nets} ReLU nets, {DEPTH - 1} layers passed")
    print(
        "width      variance of ln G: published *    ours          mean of ln G: published *  ours"
    )
    for width in WIDTHS:
        parts = [
            log_gains(width, min(_TOGETHER, nets - start), generator)
            for start in range(0, nets, _TOGETHER)
        ]
        own = found[width] = Measured(width, np.concatenate(parts))
        mean, variance = own.log_gain[:, -1].mean(), own.variance[-1]
        print(
            f"{width:5}{own.published[-1]:29.2f}{variance:12.2f} ± {own.error:.2f}"
            f"{-own.published[-1] / 2:25.2f}{mean:11.2f} ± {math.sqrt(variance / nets):.2f}"
        )
    print("* N(−β/2, β) with β = 5 Σ 1/n, as recalled")
    if picture is not None:
        draw(found, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
