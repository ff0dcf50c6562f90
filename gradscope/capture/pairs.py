"""What two tensors, or two rows of one, have in common: pure functions, on the tensors' device.

All take small samples, in rows. Nothing here makes the host wait for a device.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from gradscope.capture.precision import widened, widest

# Formats whose bits are compared, and what holds those of an entry, or of half of one.
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int32,
}
# In fewer bits rows may be alike by chance.
_FEWEST_BITS = 24


def cosine_products(one: Tensor, other: Tensor) -> Tensor:
    """Σ x·y, Σ x², Σ y² of each row, up to a factor that leaves the cosine: of shape (rows, 3).

    Entries of which one is not finite are left out.
    """
    dtype = widest(one.device)
    one, other = one.to(dtype), other.to(dtype)
    if one.is_cpu and dtype == torch.float64:
        products = _products(one, other)
        # Most are finite, and to see that is fast.
        if np.isfinite(products.numpy()).all():
            return products
    clean = torch.isfinite(one) & torch.isfinite(other)
    one, other = torch.where(clean, one, 0.0), torch.where(clean, other, 0.0)
    if dtype == torch.float32:
        one, other = _scaled(one), _scaled(other)
    return _products(one, other)


def _products(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([(one * other).sum(1), one.square().sum(1), other.square().sum(1)], 1)


def _scaled(rows: Tensor) -> Tensor:
    """Each row divided by its largest magnitude: squares neither overflow nor vanish."""
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def is_comparable(dtype: torch.dtype, columns: int) -> bool:
    """Whether rows of so many entries are hardly ever alike by chance."""
    return dtype in _BITS and columns > 1 and columns * _precision(dtype) >= _FEWEST_BITS


def _precision(dtype: torch.dtype) -> int:
    """Bits of the mantissa."""
    return round(1 / torch.finfo(dtype).eps).bit_length()


def duplicate_rows(sample: Tensor) -> Tensor:
    """(Rows that equal another one to the bit, rows): of shape (2,); 0 of 0 below two rows.

    Rows of zeros, as layers begin with that are to do nothing at first, and rows with an entry
    that is not finite are left out.
    """
    bits = sample.contiguous().view(_BITS[sample.dtype]).to(torch.int64)
    # That of two other rows is the same once in 2**31.
    codes = (bits * _factors(bits.shape[1], bits.device)).sum(1)
    largest = sample.abs().amax(1)
    # Of NaN neither is true.
    known = (largest > 0) & (largest < torch.inf)
    alike = (codes[:, None] == codes) & known
    # Each equals itself.
    repeated = known & (alike.sum(1) > 1)
    rows = known.sum()
    return widened(torch.stack([repeated.sum(), torch.where(rows > 1, rows, 0)]))


@cache
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd random numbers: a sum with them, modulo 2**64, tells what was added up."""
    generator = torch.Generator("cpu").manual_seed(count)
    drawn = torch.randint(-(2**62), 2**62, (count,), generator=generator, device="cpu")
    return drawn.mul_(2).add_(1).to(device, non_blocking=True)


def below(second: Tensor, limits: Tensor) -> Tensor:
    """(Entries whose root is below the row's limit, entries): of shape (rows, 2).

    Zeros, and what is not finite, are left out.
    """
    wide = torch.float64 if second.dtype == torch.float64 else torch.float32
    root = second.to(wide).sqrt()
    known = (root > 0) & (root < torch.inf)
    small = known & (root < limits.to(wide)[:, None])
    return widened(torch.stack([small.sum(1), known.sum(1)], 1))


def mean_cosine(samples: Tensor) -> Tensor:
    """(Mean cosine of two different rows, 1): of shape (2,); 0 and 0 below two rows.

    (‖Σ ŷᵢ‖² − n) / n(n−1) of the n rows' directions ŷᵢ. Rows of zeros, and those with an entry that
    is not finite, are left out.
    """
    # Scaled, they need no wider format than their own.
    wide = samples if samples.dtype == torch.float64 else samples.to(torch.float32)
    largest = wide.abs().amax(1, keepdim=True)
    # Of NaN neither is true.
    known = (largest > 0) & (largest < torch.inf)
    scaled = torch.where(known, wide, 0.0) / torch.where(known, largest, 1.0)
    # No length is below 1 but those that are 0.
    directions = scaled / scaled.square().sum(1, keepdim=True).sqrt().clamp_min(1.0)
    count = known.sum().to(wide.dtype)
    pairs = count * (count - 1)
    mean = (directions.sum(0).square().sum() - count) / pairs.clamp_min(1.0)
    has_pairs = pairs > 0
    return widened(torch.stack([torch.where(has_pairs, mean, 0.0), has_pairs.to(wide.dtype)]))
