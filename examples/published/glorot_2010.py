"""Glorot & Bengio 2010, figures 6 and 7: initialization and the gradient of a tanh net.

Five hidden layers of 1000 tanh units. The weights were then usually U(−1/√n, 1/√n): a variance of
1/(3n), a third of what keeps a signal. The gradient shrinks on its way to the input. With their
"normalized" initialization, of variance 2/(n_in + n_out), it hardly does. They had Shapeset, CIFAR
and others; here it is scikit-learn's digits.

    python examples/published/glorot_2010.py [picture.png]
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradscope.comparison.draws import Draws
from gradscope.comparison.meanfield import predict
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

HIDDEN = 5
CLASSES = 10
SAMPLES = 256

# σ_w², the variance of a weight times its fan-in where a layer is as wide as the last.
WEIGHT_VARIANCE = {"standard": 1 / 3, "normalized": 1.0}
# The mean singular value of a layer's Jacobian, as recalled from their text.
PUBLISHED_SINGULAR_VALUE = {"standard": 0.5, "normalized": 0.8}


@dataclass(frozen=True)
class Measured:
    """Of hidden layers 1 to 5. gradient, activation: standard deviations; expected: √χ per layer.

    singular_value: the mean of those of ∂z^(l+1)/∂z^l, over the layers.
    """

    gradient: list[float]
    activation: list[float]
    expected: list[float]
    singular_value: float

    @property
    def growth(self) -> float:
        """The factor of the gradient per layer, towards the input."""
        return math.exp(math.log(self.gradient[0] / self.gradient[-1]) / (HIDDEN - 1))

    @property
    def expected_growth(self) -> float:
        """The same, by mean-field theory."""
        return math.prod(self.expected) ** (1 / (HIDDEN - 1))


def standard(fan_in: int, _: int) -> float:
    return 1 / (3 * fan_in)


def normalized(fan_in: int, fan_out: int) -> float:
    return 2 / (fan_in + fan_out)


def measure(name: str, width: int, draws: Draws) -> Measured:
    digits = load_digits()
    pixels = torch.tensor(digits.data[:SAMPLES], dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    variance = standard if name == "standard" else normalized

    values, sums, weights = pixels, [], []
    sizes = [pixels.shape[1], *[width] * HIDDEN, CLASSES]
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        # The same numbers for both, scaled: what differs is the initialization alone.
        noise = draws.uniform(f"layer {layer}", (fan_out, fan_in))
        weights.append(noise * math.sqrt(variance(fan_in, fan_out)))
        sums.append((values @ weights[-1].T).requires_grad_())
        values = sums[-1].tanh()
    loss = nn.functional.cross_entropy(sums[-1], torch.tensor(digits.target[:SAMPLES]))
    gradients = torch.autograd.grad(loss, sums[:HIDDEN])

    first = float(sums[0].detach().square().mean())
    theory = predict("tanh", WEIGHT_VARIANCE[name], q0=first, depth=HIDDEN)
    return Measured(
        [float(gradient.std()) for gradient in gradients],
        [float(z.detach().tanh().std()) for z in sums[:HIDDEN]],
        theory.growth[: HIDDEN - 1].tolist(),
        float(np.mean([jacobian(w, z) for w, z in zip(weights[1:-1], sums, strict=False)])),
    )


def jacobian(weight: Tensor, before: Tensor) -> float:
    """The mean singular value of ∂z^(l+1)/∂z^l = W φ′(z^l), for one sample."""
    slopes = 1 - before[0].detach().tanh().square()
    return float(torch.linalg.svdvals(weight * slopes).mean())


def draw(found: dict[str, Measured], picture: str | Path) -> None:
    with drawing(LIGHT):
        figure, axes = new_figure(3.4)
        layers = np.arange(1, HIDDEN + 1)
        looks = (("standard", LIGHT.nonfinite, "s"), ("normalized", LIGHT.line, "o"))
        for name, colour, mark in looks:
            own = np.array(found[name].gradient) / found[name].gradient[-1]
            theory = np.append(np.cumprod(found[name].expected[::-1])[::-1], 1)
            axes.plot(layers, own, mark, c=colour, label=f"{name}, measured")
            axes.plot(layers, theory, "-", lw=1.2, c=colour, label=f"{name}, theory")
        axes.set_yscale("log")
        axes.set_xticks(layers)
        axes.set_xlabel("hidden layer")
        axes.set_ylabel("gradient, relative to layer 5")
        level_lines(axes, LIGHT)
        titled(axes, "Glorot & Bengio 2010: back-propagated gradient of a tanh net")
        legend(axes, own=True)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(picture: str | Path | None = None, *, width: int = 1000) -> dict[str, Measured]:
    draws = Draws(0)
    found = {name: measure(name, width, draws) for name in WEIGHT_VARIANCE}

    print(f"Standard deviation of the gradient of hidden layers 1 to {HIDDEN}:")
    for name, own in found.items():
        print(f"  {name:11}" + "".join(f"{value:10.2e}" for value in own.gradient))
    print("\n                                      published   theory   ours")
    for name, said in (("standard", "shrinks"), ("normalized", "stays")):
        own = found[name]
        print(f"gradient per layer, {name:11}    {said:>12}", end="")
        print(f"{own.expected_growth:9.3f}{own.growth:7.3f}")
    for name, published in PUBLISHED_SINGULAR_VALUE.items():
        own = found[name]
        print(f"mean singular value, {name:11}  about {published:.1f} *{own.singular_value:18.2f}")
    print("* as recalled")
    if picture is not None:
        draw(found, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
