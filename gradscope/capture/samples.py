"""Which coordinates of large parameters updates are measured on: a fixed pseudo-random sample.

What a step changes is known from a copy of what was before. Of all parameters that would double
the memory; here it is bounded, whatever the model. A stride would alias with the tensor's
structure: rows that are all alike, heads, every other gate.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.config import CaptureConfig
from gradscope.capture.shards import local
from gradscope.capture.statistics import SAMPLE

# The relative error of a norm from m coordinates is about 1/√(2m): 1.1 % for evenly sized ones.
LARGEST_SAMPLE = 4_096
# Of very many parameters each gets less, but not less than an error of 9 %.
_SMALLEST_SAMPLE = 64
# Parameters of no more than so many times a sample are measured as a whole.
_EXACT = 8
# Of weight and gradient together 16 MB in float32.
_ALL_ENTRIES = 2_097_152
# Of outputs there may be as many sizes as there are batches.
_MOST_SIZES = 256

T = TypeVar("T")


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]


def is_turn(count: int) -> bool:
    """Whether what changes slowly is looked at in the recorded step, counted from 1."""
    return count <= 10 or count % 10 == 0  # noqa: PLR2004


class Draw:
    """Draws the same `size` of so many coordinates each time; None: all of them.

    distinct: none of them twice, which takes longer to draw.
    """

    def __init__(self, size: int, *, distinct: bool = False) -> None:
        self.size = size
        self._distinct = distinct
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, count: int, device: torch.device) -> Tensor | None:
        """The drawn ones, in ascending order, on the device."""
        if count <= self.size:
            return None
        key = (count, device)
        if key not in self._drawn:
            if len(self._drawn) >= _MOST_SIZES:
                self._drawn = {}
            # Its own generator: the user's random numbers stay what they are.
            generator = torch.Generator("cpu").manual_seed(count)
            if self._distinct:
                drawn = torch.randperm(count, generator=generator, device="cpu")[: self.size]
            else:
                drawn = torch.randint(count, (self.size,), generator=generator, device="cpu")
            # In the order in which they lie in memory: half as dear.
            self._drawn[key] = drawn.sort().values.to(device, non_blocking=True)
        return self._drawn[key]

    def of(self, flat: Tensor) -> Tensor:
        """The flat tensor's entries there; where it is all of them, the tensor."""
        coordinates = self(flat.numel(), flat.device)
        return flat if coordinates is None else flat.index_select(0, coordinates)


def sample_size(parameters: Iterable[Tensor]) -> int:
    """How many coordinates of each parameter are measured; of small ones all."""
    sizes = [entries(parameter) for parameter in parameters]
    size = LARGEST_SAMPLE
    while size > _SMALLEST_SAMPLE and sum(_measured(n, size) for n in sizes) > _ALL_ENTRIES:
        size //= 2
    return size


def _measured(numel: int, size: int) -> int:
    return numel if numel <= _EXACT * size else size


def sampling(parameters: Iterable[Tensor], config: CaptureConfig) -> str | None:
    """What is measured on a sample, in words; None where nothing is."""
    known = list(parameters)
    size = sample_size(known)
    said = []
    if any(entries(parameter) > _EXACT * size for parameter in known):
        said.append(
            f"updates and histograms of parameters above {_EXACT * size:,} entries, "
            f"on a fixed sample of {size:,}"
        )
    if config.counts_everything:
        said.append(
            f"histograms of outputs and of gradients arriving there from {2 * SAMPLE:,} entries "
            f"on, on evenly spaced ones, no fewer than {SAMPLE:,}"
        )
    return "; ".join(said) or None


def entries(parameter: Tensor) -> int:
    """The real numbers that it holds; of a parameter that is split, that this process holds."""
    return statistics.real_entries(local(parameter))


class CoordinateSamples:
    """A fixed sample of coordinates for each size of large tensors."""

    def __init__(self, config: CaptureConfig) -> None:
        # Whether histograms are wanted of more than the gradients.
        self.count_everything = config.counts_everything
        self._draw = Draw(LARGEST_SAMPLE)

    def fit(self, parameters: Iterable[Tensor]) -> None:
        """Samples are so small that those of all these parameters together stay bounded."""
        size = sample_size(parameters)
        if size != self._draw.size:
            self._draw = Draw(size)

    def coordinates(self, parameter: Tensor) -> Tensor | None:
        """The sampled coordinates of the flat parameter; None: all of them."""
        numel = entries(parameter)
        if numel <= _EXACT * self._draw.size:
            return None
        return self._draw(numel, parameter.device)

    def take(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A copy of the tensor's entries at the parameter's sampled coordinates."""
        flat = statistics.plain(tensor)
        coordinates = self.coordinates(parameter)
        return flat.clone() if coordinates is None else flat.index_select(0, coordinates)
