"""Xiong et al. 2020: where layer normalization stands, and a transformer's gradient.

With normalization after each residual sum (post-LN, as first published) the gradient of the last
layer's feed-forward weights is large however deep the transformer is, O(d √ln d): hence the
warm-up. With normalization inside the branches (pre-LN) it is O(d √(ln d / L)), smaller by the root
of the number of layers L.

    python examples/published/xiong_2020.py [picture.png]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradscope.comparison.activation import activation_called
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import initialization_called, initialize
from gradscope.comparison.quadrature import F64
from gradscope.figures import LIGHT
from gradscope.reporters.figures.canvas import legend, level_lines, new_figure, rendered, titled
from gradscope.reporters.figures.theme import drawing

HEADS = 4
CLASSES = 10
SAMPLES = 16
# How the gradient of the last layer goes with the number of layers: L to this power.
PUBLISHED = {"post-LN": 0.0, "pre-LN": -0.5}


@dataclass(frozen=True)
class Measured:
    """‖∂loss/∂W‖ of the last layer's second feed-forward matrix: (depths,)."""

    depths: tuple[int, ...]
    last: F64

    @property
    def power(self) -> float:
        """Of L, fitted."""
        return float(np.polyfit(np.log(self.depths), np.log(self.last), 1)[0])


class Rows(nn.Module):
    """A transformer that reads a digit row by row and names it at each of its 8 rows."""

    def __init__(self, depth: int, width: int, *, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        # One by one: nn.TransformerEncoder would copy the same weights into every layer.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """From (samples, 8, 8) to (samples, 8, classes)."""
        values = self.embedding(images) + self.position
        for layer in self.layers:
            values = layer(values)
        scores: Tensor = self.head(self.norm(values))
        return scores


def gradient(depth: int, width: int, draws: Draws, *, norm_first: bool) -> float:
    """The norm for the loss of one position, the mean of some.

    Summed over positions, gradients add up where positions are alike, as they are with depth.
    """
    digits = load_digits()
    images = torch.tensor(digits.images[:SAMPLES], dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target[:SAMPLES])

    model = Rows(depth, width, norm_first=norm_first)
    # Xavier, as they had it: q, k and v each with fans of its own, although torch packs them.
    xavier = initialization_called("xavier_normal")
    initialize(model, xavier, activation_called("relu"), draws, lambda: None)
    with torch.no_grad():
        model.position.copy_(draws.normal("position", (8, width)))
    last = model.get_parameter(f"layers.{depth - 1}.linear2.weight")
    scores = model(images)
    norms = []
    for sample, label in enumerate(labels):
        loss = nn.functional.cross_entropy(scores[sample, sample % 8], label)
        (found,) = torch.autograd.grad(loss, last, retain_graph=True)
        norms.append(found.norm().item())
    return float(np.mean(norms))


def draw(found: dict[str, Measured], picture: str | Path) -> None:
    with drawing(LIGHT):
        figure, axes = new_figure(3.4)
        norms = [own.last for own in found.values()]
        looks = (("post-LN", LIGHT.nonfinite, "s"), ("pre-LN", LIGHT.line, "o"))
        for name, colour, mark in looks:
            own = found[name]
            depths = np.array(own.depths)
            # The published power, through the middle of what is measured.
            power = depths ** PUBLISHED[name]
            level = np.exp(np.mean(np.log(own.last / power)))
            axes.plot(depths, own.last, mark, c=colour, label=f"{name}, measured")
            said = "constant" if name == "post-LN" else "1/√L"
            axes.plot(depths, level * power, c=colour, lw=1.2, label=f"{name}, published: {said}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        levels = [round(float(np.min(norms)), 1), round(float(np.max(norms)), 1)]
        axes.set_yticks(levels, [f"{level:g}" for level in levels])
        axes.set_xlabel("layers L")
        axes.set_ylabel("‖gradient‖, last layer")
        level_lines(axes, LIGHT)
        titled(axes, "Xiong et al. 2020: feed-forward weights of a transformer's last layer")
        legend(axes, own=True)
        Path(picture).write_bytes(rendered(figure, dpi=110, colors=64))


def main(
    picture: str | Path | None = None,
    *,
    depths: Sequence[int] = (2, 4, 6, 12, 24),
    width: int = 128,
    seeds: int = 3,
) -> dict[str, Measured]:
    found = {}
    for name in PUBLISHED:
        norms = [
            [gradient(depth, width, Draws(seed), norm_first=name == "pre-LN") for depth in depths]
            for seed in range(seeds)
        ]
        found[name] = Measured(tuple(depths), np.mean(norms, axis=0))

    post, pre = found["post-LN"], found["pre-LN"]
    print("Norm of the gradient of the last layer's second feed-forward matrix:")
    print("layers    post-LN    pre-LN    pre-LN × √L    post / pre")
    for depth, after, before in zip(depths, post.last, pre.last, strict=True):
        print(
            f"{depth:6}{after:11.4f}{before:10.4f}{before * depth**0.5:15.4f}{after / before:14.2f}"
        )
    print("\nIt goes as a power of L:    published *     ours")
    for name, power in PUBLISHED.items():
        print(f"{name:24}{power:15.1f}{found[name].power:9.2f}")
    print("* the bounds O(d √ln d) and O(d √(ln d / L)) as recalled")
    if picture is not None:
        draw(found, picture)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
