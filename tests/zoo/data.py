"""What the programs train on: ships with a dependency, or is drawn."""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    """1 797 images of 8×8 as vectors in [0, 1], 10 classes."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def batches(data: Batch, steps: int, size: int = 32) -> Iterator[Batch]:
    """Random batches."""
    inputs, targets = data
    for _ in range(steps):
        drawn = torch.randint(len(inputs), (size,))
        yield inputs[drawn], targets[drawn]
