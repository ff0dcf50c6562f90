"""Pennington et al. 2017: a tanh net can be isometric, if its weights are orthogonal; ReLU can't.

A gradient whose norm is kept on average may still lose most of its directions. What says so are
the singular values of the Jacobian from the first pre-activation to the last: an isometry has all
of them at 1. Their result: relative to its mean, the square of a singular value has the variance

    L (κ − 1 − s),   κ = E φ′⁴ / (E φ′²)²,   s = 0 for orthogonal weights, −1 for Gaussian ones

with L layers. For ReLU κ is 2 whatever the weights. For tanh it is 1 where the variance q of
pre-activations is small, and the critical line says which weights keep q there.

    python examples/published/pennington_2017.py [picture.png]
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradscope.comparison.activation import Activation, activation_called
from gradscope.comparison.critical import critical_line
from gradscope.comparison.draws import Draws
from gradscope.comparison.meanfield import moments
from gradscope.comparison.quadrature import F64
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

DEPTH = 10


@dataclass(frozen=True)
class Net:
    """A point of the critical line, where the mean squared singular value is 1."""

    name: str
    activation: Activation
    weight_variance: float
    bias_variance: float
    q: float
    orthogonal: bool

    @property
    def published(self) -> float:
        """L (κ − 1 − s)."""
        kurtosis = moments(self.activation, self.q).kurtosis
        return DEPTH * (kurtosis - 1 + (0 if self.orthogonal else 1))


def nets() -> list[Net]:
    tanh, relu = activation_called("tanh"), activation_called("relu")
    biases = (1e-5, 0.05)
    line = critical_line(tanh, biases)
    found = []
    for orthogonal in (True, False):
        weights = "orthogonal" if orthogonal else "Gaussian"
        found += [
            Net(f"tanh, q = {q:.2g}, {weights}", tanh, float(w), bias, float(q), orthogonal)
            for bias, w, q in zip(biases, line.weight_variance, line.q, strict=True)
        ]
        found.append(Net(f"ReLU, {weights}", relu, 2.0, 0.0, 1.0, orthogonal))
    return found


def singular_values(net: Net, width: int, draws: Draws) -> F64:
    """Those of ∂h^L/∂h^0, with h^0 ~ N(0, q)."""
    values = math.sqrt(net.q) * draws.normal("input", (width,))
    jacobian = torch.eye(width, dtype=torch.float64)
    for layer in range(DEPTH):
        name = f"layer {layer}"
        weight = (
            draws.orthogonal(name, width, width)[0]
            if net.orthogonal
            else draws.normal(name, (width, width)) / math.sqrt(width)
        )
        weight = math.sqrt(net.weight_variance) * weight
        values.requires_grad_()
        (slopes,) = torch.autograd.grad(net.activation(values).sum(), values)
        jacobian = (weight * slopes).double() @ jacobian
        bias = math.sqrt(net.bias_variance) * draws.normal(f"bias {layer}", (width,))
        values = weight @ net.activation(values.detach()) + bias
    found: F64 = torch.linalg.svdvals(jacobian).numpy()
    return found


def spread(values: F64) -> float:
    """The variance of s² relative to its squared mean."""
    squares = values**2
    return float(squares.var() / squares.mean() ** 2)


def draw(found: dict[str, F64], picture: str | Path) -> None:
    shown = (
        ("tanh, q = 0.02, orthogonal", LIGHT.line, "-"),
        ("tanh, q = 0.57, orthogonal", LIGHT.last, "-"),
        ("ReLU, orthogonal", LIGHT.first, "-"),
        ("tanh, q = 0.02, Gaussian", LIGHT.line, "--"),
        ("ReLU, Gaussian", LIGHT.first, "--"),
    )
    with drawing(LIGHT):
        figure, axes = new_figure(3.6)
        for name, colour, dashes in shown:
            values = np.sort(found[name])[::-1]
            place = (np.arange(values.size) + 0.5) / values.size
            # ReLU's dead directions are at 0, which has no place on this scale.
            axes.plot(place, np.maximum(values, 1e-8), dashes, c=colour, lw=1.6, label=name)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 10)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the singular values that are larger")
        axes.set_ylabel("singular value")
        level_lines(axes, LIGHT)
        titled(axes, f"Pennington et al. 2017: the Jacobian of {DEPTH} layers; an isometry is at 1")
        legend(axes, own=False, over=True)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(
    picture: str | Path | None = None, *, width: int = 256, seeds: int = 4
) -> dict[str, tuple[float, float]]:
    """Per net the variance of squared singular values, published and ours."""
    draws = [Draws(seed) for seed in range(seeds)]
    found, pairs = {}, {}
    print("variance of s² / mean(s²)²         published *    ours     largest s / median s")
    for net in nets():
        values = [singular_values(net, width, each) for each in draws]
        found[net.name] = np.concatenate(values)
        pairs[net.name] = net.published, float(np.mean([spread(each) for each in values]))
        ratio = float(np.mean([each.max() / np.median(each) for each in values]))
        condition = f"{ratio:22.1f}" if ratio < 1 / np.finfo(np.float32).eps else f"{'∞':>22}"
        print(f"{net.name:34}" + "{:11.2f}{:9.2f}".format(*pairs[net.name]) + condition)
    print("* the formula as recalled, with our κ")
    if picture is not None:
        draw(found, picture)
    return pairs


if __name__ == "__main__":
    main(*sys.argv[1:])
