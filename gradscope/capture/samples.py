"""Which coordinates of large parameters updates are measured on: a fixed pseudo-random sample.

What a step changes is known from a copy of what was before. Of all parameters that would double
the memory; here it is bounded, whatever the model. A stride would alias with the tensor's
structure: rows that are all alike, heads, every other gate.
"""

from collections.abc import Iterable

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
        self._size = LARGEST_SAMPLE
        self._by_numel: dict[tuple[int, torch.device], Tensor] = {}

    def fit(self, parameters: Iterable[Tensor]) -> None:
        """Samples are so small that those of all these parameters together stay bounded."""
        size = sample_size(parameters)
        if size != self._size:
            self._size, self._by_numel = size, {}

    def coordinates(self, parameter: Tensor) -> Tensor | None:
        """The sampled coordinates of the flat parameter; None: all of them."""
        numel = entries(parameter)
        if numel <= _EXACT * self._size:
            return None
        key = (numel, parameter.device)
        if key not in self._by_numel:
            # Its own generator: the user's random numbers stay what they are.
            generator = torch.Generator("cpu").manual_seed(numel)
            drawn = torch.randint(numel, (self._size,), generator=generator, device="cpu")
            # In the order in which they lie in memory: half as dear.
            self._by_numel[key] = drawn.sort().values.to(parameter.device, non_blocking=True)
        return self._by_numel[key]

    def take(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A copy of the tensor's entries at the parameter's sampled coordinates."""
        flat = statistics.plain(tensor)
        coordinates = self.coordinates(parameter)
        return flat.clone() if coordinates is None else flat.index_select(0, coordinates)
