"""Schoenholz et al. 2017, figure 5: random nets train up to a depth of about 6 ξ.

Two inputs become more alike from layer to layer of a tanh net with small weights, and with large
ones less alike, whatever they were; either is over in about ξ layers. What the last layer can't
tell apart, training can't, either: nets train that are not much deeper than 6 ξ. At the critical
variance σ_w² = 1.76 (for σ_b² = 0.05) ξ is infinite. They had MNIST and a width of 300; here it is
scikit-learn's digits and a width of 64.

    python examples/published/schoenholz_2017.py [picture.png]
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
from torch import Tensor

from gradscope.comparison.meanfield import predict
from gradscope.comparison.quadrature import F64
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

BIAS_VARIANCE = 0.05
CLASSES = 10
BATCH = 64
RATES = (0.01, 0.05)
VARIANCES = (0.5, 1.0, 1.3, 1.76, 2.5, 4.0)
DEPTHS = (5, 10, 20, 40, 80)
# Half right on ten classes.
TRAINED = 0.5
# From here on a number of layers is only a distance from the critical point.
_FAR = 1000


@dataclass(frozen=True)
class Trained:
    """accuracy: (depths, variances), on the training images, with the better learning rate."""

    depths: tuple[int, ...]
    variances: tuple[float, ...]
    accuracy: F64

    @property
    def published(self) -> list[float]:
        """6 ξ per weight variance."""
        return [
            predict("tanh", variance, BIAS_VARIANCE).trainable_depth for variance in self.variances
        ]

    def deepest(self, variance: float) -> int:
        """The deepest net that trained, before the first that didn't; 0 if none did."""
        found = 0
        for depth, accuracy in zip(
            self.depths, self.accuracy[:, self.variances.index(variance)], strict=True
        ):
            if accuracy < TRAINED:
                break
            found = depth
        return found


def train(depth: int, variances: Sequence[float], width: int, steps: int) -> F64:
    """The accuracy per variance: nets of all variances and learning rates at once, as one batch."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    labels = torch.tensor(digits.target)

    source = torch.Generator().manual_seed(0)
    nets = len(variances) * len(RATES)
    spread = torch.tensor([v for v in variances for _ in RATES]).sqrt().view(-1, 1, 1)
    rate = torch.tensor([r for _ in variances for r in RATES]).view(-1, 1, 1)
    sizes = [pixels.shape[1], *[width] * (depth - 1), CLASSES]
    weights, biases = [], []
    for fan_in, fan_out in itertools.pairwise(sizes):
        noise = torch.randn(1, fan_in, fan_out, generator=source) / math.sqrt(fan_in)
        weights.append((spread * noise).requires_grad_())
        noise = torch.randn(1, 1, fan_out, generator=source)
        biases.append((math.sqrt(BIAS_VARIANCE) * noise).repeat(nets, 1, 1).requires_grad_())

    def outputs(values: Tensor) -> Tensor:
        values = values.expand(nets, -1, -1)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            values = torch.baddbmm(bias, values, weight).tanh()
        return torch.baddbmm(biases[-1], values, weights[-1])

    parameters = [*weights, *biases]
    for _ in range(steps):
        drawn = torch.randint(len(pixels), (BATCH,), generator=source)
        scores = outputs(pixels[drawn])
        # The nets don't touch each other: the gradient of the sum is each one's own.
        loss = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), labels[drawn].repeat(nets), reduction="sum"
        )
        gradients = torch.autograd.grad(loss / BATCH, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(rate * gradient)
    with torch.no_grad():
        right = (outputs(pixels).argmax(2) == labels).double().mean(1)
    found: F64 = right.view(len(variances), len(RATES)).amax(1).numpy()
    return found


def draw(found: Trained, picture: str | Path) -> None:
    with drawing(LIGHT):
        figure, axes = new_figure(3.8)
        image = axes.imshow(
            found.accuracy, origin="lower", aspect="auto", vmin=0, vmax=1, cmap=LIGHT.colormap
        )
        rows = np.interp(
            np.log(found.published), np.log(found.depths), np.arange(len(found.depths)),
            left=-0.2, right=len(found.depths) - 0.6,
        )  # fmt: skip
        axes.plot(rows, "o-", c="white", mec=LIGHT.ink, mew=1.0, ms=7, lw=2)
        for column, (row, depth) in enumerate(zip(rows, found.published, strict=True)):
            said = f"= {depth:.0f}" if depth < _FAR else f"> {_FAR}"
            axes.annotate(
                f"6 ξ {said}", (column, row), (0, -13), textcoords="offset points", ha="center",
                fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1.2},
            )  # fmt: skip
        axes.set_xticks(range(len(found.variances)), [f"{v:g}" for v in found.variances])
        axes.set_yticks(range(len(found.depths)), [str(depth) for depth in found.depths])
        axes.set_xlabel("weight variance σ_w²")
        axes.set_ylabel("layers")
        figure.colorbar(image, ax=axes, label="accuracy after training")
        titled(axes, "Schoenholz et al. 2017: tanh nets train up to a depth of about 6 ξ")
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=96))


def main(
    picture: str | Path | None = None,
    *,
    variances: Sequence[float] = VARIANCES,
    depths: Sequence[int] = DEPTHS,
    width: int = 64,
    steps: int = 300,
) -> Trained:
    accuracy = np.array([train(depth, variances, width, steps) for depth in depths])
    found = Trained(tuple(depths), tuple(variances), accuracy)
    print(f"Accuracy after {steps} steps, by depth; trains: the deepest with {TRAINED:.0%} or more")
    print("σ_w²   published * 6 ξ   ours: trains  " + "".join(f"{d:>7}" for d in depths))
    for column, (variance, limit) in enumerate(zip(variances, found.published, strict=True)):
        row = "".join(f"{value:7.2f}" for value in accuracy[:, column])
        said = f"{limit:.0f}" if limit < _FAR else f"> {_FAR}"
        print(f"{variance:4}{said:>18}{found.deepest(variance):15}  {row}")
    print("* the factor 6 as recalled, with our ξ")
    if picture is not None:
        draw(found, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
