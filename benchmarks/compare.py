"""How long `gradscope.compare` takes: a 30-layer MLP of width 256, a batch of 64.

python -m benchmarks.compare
"""

import torch
from torch import nn

import gradscope
from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.initialization import COMPARED as INITIALIZATIONS

# All but the three that are there for theory.
_ACTIVATIONS = tuple(ACTIVATIONS)[:-3]


def main() -> None:
    torch.manual_seed(0)
    hidden = [m for _ in range(29) for m in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(256, 10))
    batch = torch.randn(64, 256), torch.randint(0, 10, (64,))
    for initializations, activations, seeds in (
        (INITIALIZATIONS[2:5], _ACTIVATIONS[:3], 3),
        (INITIALIZATIONS, _ACTIVATIONS, 5),
    ):
        made = gradscope.compare(
            model,
            batch,
            nn.functional.cross_entropy,
            initializations=initializations,
            activations=activations,
            seeds=seeds,
        )
        size = f"{len(initializations)} x {len(activations)} x {seeds}"
        print(f"{size}: {made.seconds:.1f} s, {len(made.left_out)} configurations don't exist")


if __name__ == "__main__":
    main()
