"""Yang et al. 2019: batch normalization makes the gradient of a deep net without skips explode.

In layers W φ(BatchNorm(h)) the squared norm of the gradient grows on its way to the input, for
ReLU by π/(π − 1) = 1.467 per layer with a large batch. No variance of the weights helps, as
normalization takes it out again; no activation but a straight line helps, either.

    python examples/published/yang_2019.py [picture.png]
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradscope.comparison.activation import activation_called
from gradscope.comparison.draws import Draws
from gradscope.comparison.quadrature import F64
from gradscope.comparison.stacks import batch_norm
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

DEPTH = 20
PUBLISHED = math.pi / (math.pi - 1)


def squared_norms(
    activation: str, width: int, batch: int, draws: Draws, *, weight_variance: float = 2.0
) -> F64:
    """‖∂/∂h‖² of layers 1 to DEPTH, of the whole batch, relative to the last's.

    The input, layer 0, is left out: its variance is not that of the layers.
    """
    phi = activation_called(activation)
    sums = [draws.normal("input", (batch, width)).clone().requires_grad_()]
    for layer in range(1, DEPTH + 1):
        weight = draws.normal(f"layer {layer}", (width, width))
        normalized = nn.functional.batch_norm(sums[-1], None, None, training=True)
        sums.append(phi(normalized) @ weight.T * math.sqrt(weight_variance / width))
    cotangent = draws.normal("cotangent", (batch, width))
    gradients = torch.autograd.grad(sums[-1], sums[1:-1], cotangent)
    norms = [float(gradient.double().square().sum()) for gradient in (*gradients, cotangent)]
    return np.array(norms) / norms[-1]


def growth(norms: F64) -> float:
    """Per layer, the geometric mean."""
    return float((norms[0] / norms[-1]) ** (1 / (len(norms) - 1)))


def draw(curves: dict[int, F64], picture: str | Path) -> None:
    with drawing(LIGHT):
        figure, axes = new_figure(3.4)
        passed = np.arange(DEPTH)
        looks = zip(curves.items(), (LIGHT.nonfinite, LIGHT.last, LIGHT.line), "s^o", strict=False)
        for (batch, norms), colour, mark in looks:
            axes.plot(passed, norms[::-1], mark, c=colour, ms=5, label=f"batch of {batch}")
        axes.plot(passed, PUBLISHED**passed, c=LIGHT.ink, lw=1.2, label="(π/(π − 1))^layers")
        axes.set_yscale("log")
        axes.set_xticks(range(0, DEPTH, 5))
        axes.set_xlabel("layers that the gradient has passed")
        axes.set_ylabel("‖gradient‖², relative")
        level_lines(axes, LIGHT)
        titled(axes, "Yang et al. 2019: ReLU with batch normalization")
        legend(axes, own=False)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(
    picture: str | Path | None = None,
    *,
    width: int = 512,
    batches: Sequence[int] = (16, 64, 512),
    seeds: int = 3,
) -> dict[str, float]:
    """The growth per layer, by what it is of."""
    draws = [Draws(seed) for seed in range(seeds)]

    def mean(activation: str, batch: int, weight_variance: float = 2.0) -> F64:
        logarithms = [
            np.log(squared_norms(activation, width, batch, each, weight_variance=weight_variance))
            for each in draws
        ]
        found: F64 = np.exp(np.mean(logarithms, axis=0))
        return found

    curves = {batch: mean("relu", batch) for batch in batches}
    large = max(batches)
    found = {f"relu, batch of {batch}": growth(norms) for batch, norms in curves.items()}
    found["relu, σ_w² = 0.1"] = growth(mean("relu", large, 0.1))
    found |= {name: growth(mean(name, large)) for name in ("tanh", "selu", "linear")}

    print(f"Squared norm of the gradient, factor per layer (width {width}, batch of {large}):")
    print("                      published   theory     ours")
    for name, own in found.items():
        kind, _, rest = name.partition(",")
        said = f"{PUBLISHED:.3f}" if kind == "relu" else "over 1"
        size = int(rest.split()[-1]) if "batch" in rest else large
        print(
            f"{name:22}{said if kind != 'linear' else '':>9}{batch_norm(kind, size):9.3f}{own:9.3f}"
        )
    if picture is not None:
        draw(curves, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
