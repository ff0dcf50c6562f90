"""How a signal spreads over the samples of a batch, and whether it is that of the step before.

On a bounded sample of the entries, where they are; nothing makes the host wait for a device.
"""

import torch
from torch import Tensor

from gradscope.capture.precision import widened, widest
from gradscope.capture.shards import local
from gradscope.capture.statistics import in_any_order

# What `spread` knows, in this order.
SPREAD = ("sample_std", "feature_std_min", "feature_std_max", "distinct")

# Of images 16 × 3 × 224 × 224 all samples and channels, and 2,731 places. That is 1 MB in float64,
# and a few milliseconds on a CPU. Of a feature no fewer than 32 samples are seen, where there are
# as many: its standard deviation is known within 13 %.
_ENTRIES = 131_072
_FEATURES = 4_096
# Of two batches of data most entries differ; `distinct` sorts them.
_SAMPLED = 4_096

# Equal to the bit: NaN is equal to itself, and -0.0 not to 0.0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> Tensor:
    """A copy of no more than 4,096 entries, evenly spaced as they lie in memory."""
    flat = in_any_order(tensor)
    return flat[:: _stride(flat.numel(), _SAMPLED)].clone()


def _stride(size: int, most: int) -> int:
    """Of every how many entries one is taken, to have no more than `most`."""
    # Odd: no power of two that a shape is made of divides it.
    return -(-size // most) | 1 if size > most else 1


def is_same(sample: Tensor, other: Tensor) -> Tensor:
    """1 where two fingerprints are equal to the bit, else 0: a scalar."""
    if (sample.shape, sample.dtype, sample.device) != (other.shape, other.dtype, other.device):
        return widened(torch.zeros((), device=sample.device))
    bits = _BITS[sample.dtype.itemsize]
    return widened((sample.view(bits) == other.view(bits)).all())


def spread(tensor: Tensor, sample: Tensor) -> Tensor:
    """Of a tensor that is not empty, and its fingerprint: shape (8,).

    The numbers of SPREAD, then of each 1; 0 and 0 for what is not known. Non-finite entries are
    left out. A single sample has no spread; integers, and what has no second dimension, have no
    features.
    """
    has_features = tensor.dim() > 1 and (tensor.is_floating_point() or tensor.is_complex())
    features, whole = _variances(tensor)
    lowest = torch.where(features.isnan(), torch.inf, features).amin()
    highest = torch.where(features.isnan(), -torch.inf, features).amax()
    numbers = torch.stack([whole, lowest, highest]).sqrt()
    known = torch.isfinite(numbers)
    if not has_features:
        known[1:] = False
    distinct = _distinct(sample).to(numbers.dtype)
    numbers = torch.where(known, numbers, 0.0)
    return torch.cat([numbers, distinct, known.to(numbers.dtype), torch.ones_like(distinct)])


def _variances(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The variance over the samples of each feature, and of all: means over their places.

    NaN where no place has two finite entries.
    """
    wide = _sampled(tensor)
    finite = torch.isfinite(wide)
    count = finite.sum(0)
    # About the first sample: where all are the same there is no rounding error left either.
    shift = torch.where(finite[0], wide[0], 0.0)
    off = torch.where(finite, wide - shift, 0.0)
    off = torch.where(finite, off - off.sum(0) / count.clamp_min(1), 0.0)
    places = count > 1
    variance = torch.where(places, off.square().sum(0) / count.clamp_min(1), 0.0)
    return variance.sum(1) / places.sum(1), variance.sum() / places.sum()


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced samples, features and places, in the widest format: of these three dimensions.

    First of all the features, then of the samples and last of the places as many as may be.
    """
    tensor = local(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dim() == 1:
        tensor = tensor[:, None]
    tensor = tensor[:, :: _stride(tensor.shape[1], _FEATURES)]
    tensor = tensor[:: _stride(len(tensor), _ENTRIES // tensor.shape[1])]
    tensor = tensor.flatten(2) if tensor.dim() > 2 else tensor[:, :, None]  # noqa: PLR2004
    left = _ENTRIES // (tensor.shape[0] * tensor.shape[1])
    tensor = tensor[:, :, :: _stride(tensor.shape[2], max(left, 1))]
    return tensor.to(widest(tensor.device))


def _distinct(sample: Tensor) -> Tensor:
    """How many finite values there are: of shape (1,)."""
    # Not every device sorts every format of integers.
    ordered = (sample if sample.is_floating_point() else sample.to(torch.int64)).sort().values
    new = torch.isfinite(ordered)
    new[1:] &= ordered[1:] != ordered[:-1]
    return new.sum().reshape(1)
