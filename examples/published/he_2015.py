"""He et al. 2015, figures 2 and 3: with ReLU, depth needs twice Xavier's variance.

ReLU cancels half of each signal. Weights of variance 1/n (Xavier) leave half of the squared norm
of the gradient per layer, weights of variance 2/n all of it. Their net of 22 layers learned with
both, with theirs sooner; with 30 layers Xavier "completely stalls", and theirs learns. They had
convolutions and ImageNet; here it is a fully connected net and scikit-learn's digits, each
initialization with the best of three learning rates.

    python examples/published/he_2015.py [picture.png]
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from gradscope.comparison.activation import activation_called
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import initialization_called, initialize
from gradscope.comparison.meanfield import predict
from gradscope.comparison.quadrature import F64
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

CLASSES = 10
BATCH = 64
RATES = (0.003, 0.01, 0.03)
# Both are initializations of gradscope; paired, as they scale the same random numbers.
VARIANCES = {"xavier_normal": 1.0, "kaiming_normal": 2.0}
PUBLISHED = {
    (22, "xavier_normal"): "learns, later",
    (22, "kaiming_normal"): "learns",
    (30, "xavier_normal"): "stalls",
    (30, "kaiming_normal"): "learns",
}


@dataclass(frozen=True)
class Measured:
    """loss: per step, the mean over seeds. gain: of the gradient's norm from last to first layer.

    learned: in how many steps the loss is below half of chance, smoothed over 20; None: never.
    """

    loss: F64
    gain: float
    expected: float
    learned: int | None


def deep(depth: int, width: int, name: str, seed: int) -> nn.Sequential:
    sizes = [64, *[width] * (depth - 1), CLASSES]
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
    model = nn.Sequential(*parts)
    relu = activation_called("relu")
    initialize(model, initialization_called(name), relu, Draws(seed), lambda: None)
    return model


def gain(model: nn.Sequential, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The norm of the gradient at the first hidden layer over that at the last."""
    sums = []
    for part in model:
        pixels = part(pixels)
        if isinstance(part, nn.Linear):
            sums.append(pixels)
    loss = nn.functional.cross_entropy(sums[-1], labels)
    first, last = torch.autograd.grad(loss, (sums[0], sums[-2]))
    return float(first.norm() / last.norm())


def train(model: nn.Sequential, rate: float, steps: int) -> tuple[F64, float]:
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    labels = torch.tensor(digits.target)
    kept = gain(model, pixels[:BATCH], labels[:BATCH])

    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        drawn = torch.randint(len(pixels), (BATCH,), generator=order)
        loss = nn.functional.cross_entropy(model(pixels[drawn]), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), kept


def measure(depth: int, name: str, width: int, steps: int, seeds: int) -> Measured:
    best = np.full(steps, np.inf)
    for rate in RATES:
        runs = [train(deep(depth, width, name, seed), rate, steps) for seed in range(seeds)]
        loss = np.mean([own for own, _ in runs], axis=0)
        if loss[-20:].mean() < best[-20:].mean():
            best = loss
    smooth = np.convolve(best, np.ones(20) / 20, "valid")
    below = np.flatnonzero(smooth < math.log(CLASSES) / 2)
    # Between the first hidden layer and the last lie depth − 2 layers.
    expected = predict("relu", VARIANCES[name], depth=depth - 2).log_gain / 2
    kept = math.exp(float(np.mean([math.log(own) for _, own in runs])))
    return Measured(best, kept, math.exp(expected), int(below[0]) + 20 if below.size else None)


def draw(found: dict[tuple[int, str], Measured], picture: str | Path) -> None:
    depths = sorted({depth for depth, _ in found})
    with drawing(LIGHT):
        figure, _ = new_figure(3.6)
        figure.clear()
        panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
        for axes, depth in zip(panels, depths, strict=True):
            for name, colour, dashes in (
                ("xavier_normal", LIGHT.nonfinite, "--"),
                ("kaiming_normal", LIGHT.line, "-"),
            ):
                smooth = np.convolve(found[depth, name].loss, np.ones(20) / 20, "valid")
                said = "Xavier" if name == "xavier_normal" else "He"
                axes.plot(np.arange(smooth.size) + 20, smooth, dashes, c=colour, label=said)
            axes.set_xlabel("step")
            axes.set_ylim(0, 2.6)
            level_lines(axes, LIGHT)
            titled(axes, f"He et al. 2015: {depth} layers")
        figure.axes[0].set_ylabel("training loss, mean over seeds")
        legend(figure.axes[0], own=True)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(
    picture: str | Path | None = None,
    *,
    width: int = 128,
    steps: int = 500,
    seeds: int = 2,
    depths: Sequence[int] = (22, 30),
) -> dict[tuple[int, str], Measured]:
    print("                          published    ours: loss  learned   gradient first / last")
    print("layers  initialization                      at end  at step      theory       ours")
    found = {}
    for depth in depths:
        for name in VARIANCES:
            own = found[depth, name] = measure(depth, name, width, steps, seeds)
            step = "never" if own.learned is None else str(own.learned)
            print(
                f"{depth:6}  {name:16}{PUBLISHED.get((depth, name), ''):>14}"
                f"{own.loss[-20:].mean():12.2f}{step:>9}{own.expected:12.1e}{own.gain:11.1e}"
            )
    if picture is not None:
        draw(found, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
