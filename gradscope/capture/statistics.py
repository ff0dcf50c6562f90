"""Tensor → sufficient statistics, on the tensor's own device: pure functions, no state.

All sums are accumulated in float64, so that squares of 1e±20 neither overflow nor vanish. On a
device that has none the rows are those of `single_precision`. In host memory `host` is faster.
Nothing here makes the host wait for a device.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradscope.capture import fused, host, single_precision
from gradscope.capture.precision import has_float64, widened
from gradscope.capture.shards import local

# The moments of a tensor, in this order. Non-finite entries are counted, and left out of the
# rest; `min` and `max` of no finite entry are +inf and -inf.
MOMENTS = ("count", "sum", "sumsq", "min", "max", "zeros", "nonfinite")

# Magnitudes are counted by octaves: bin i holds 2**(LOWEST_OCTAVE + i) ≤ |x| < twice that.
LOWEST_OCTAVE = -112
OCTAVES = 128

# fp32 → fp64 by pieces that stay in the cache (measured: 64k elements).
_CHUNK = 65_536
# Where launching costs more than memory traffic: what a piece needs beside it stays below 200 MB.
_LARGE_CHUNK = 4_194_304

# The standard error of a share is at most half a percent.
SAMPLE = 8_192

_F64 = torch.float64


def plain(tensor: Tensor) -> Tensor:
    """The tensor as a flat real one: detached; of a complex one the real and imaginary parts.

    Of a tensor that is split over processes the part that this one holds.
    """
    return _flat(local(tensor.detach()))


def in_any_order(tensor: Tensor) -> Tensor:
    """The same as it lies in memory, where that is without gaps: a copy costs more than reading."""
    tensor = local(tensor.detach())
    if tensor.layout is torch.strided and not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return _flat(tensor)


def _flat(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj())
    return _with_kernels(tensor).reshape(-1)


def _with_kernels(tensor: Tensor) -> Tensor:
    """The 8-bit formats have few."""
    eight_bits = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.to(torch.float32) if eight_bits else tensor


def real_entries(tensor: Tensor) -> int:
    """The real numbers that it holds: a complex one is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def evenly_spaced(tensor: Tensor) -> Tensor:
    """A sample of the flat tensor's entries, not copied: at least SAMPLE, or all."""
    flat = plain(tensor)
    # Odd: no power of two that a shape is made of divides it.
    return flat[:: flat.numel() // SAMPLE | 1]


def underflows(tensor: Tensor) -> Tensor:
    """(subnormal entries, finite entries) of an evenly spaced sample: of shape (2,)."""
    sample = evenly_spaced(tensor)
    size = sample.abs()
    lost = (size > 0) & (size < torch.finfo(sample.dtype).tiny)
    return widened(torch.stack([lost.sum(), torch.isfinite(size).sum()]))


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether it lies in host memory as numbers do, and not as a subclass has it."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and has_float64(tensor.device)
    )


def moments(tensor: Tensor) -> Tensor:
    """The sufficient statistics of all entries: float64 of shape (7,), see MOMENTS."""
    if tensor.is_sparse:
        return _sparse_moments(tensor)
    flat = in_any_order(tensor)
    if _is_at_hand(flat):
        return host.moments(flat)
    if not has_float64(flat.device):
        return single_precision.moments(flat)
    if flat.numel() == 0:
        nothing = torch.zeros(len(MOMENTS), dtype=_F64, device=flat.device)
        nothing[3], nothing[4] = torch.inf, -torch.inf
        return nothing
    return _exact_moments(flat)


def moments_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of each, as `moments` has them: on a GPU, and of small ones in host memory, at once."""
    return _each(tensors, _fused(tensors, lambda rows: rows), host.joined_moments, moments)


def _each(
    tensors: Sequence[Tensor],
    known: Sequence[Tensor | None],
    together: host.Together,
    alone: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    rows = host.in_batches([_small_at_hand(tensor) for tensor in tensors], together)
    found = []
    for tensor, row, other in zip(tensors, rows, known, strict=True):
        read = other if row is None else row
        found.append(alone(tensor) if read is None else read)
    return found


def _fused(tensors: Sequence[Tensor], wanted: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """What is wanted of the moments of those that `fused` can read."""
    known: list[Tensor | None] = [None] * len(tensors)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if fused.is_on_gpu(tensor):
            flat = in_any_order(tensor)
            if fused.fits(flat):
                by_device.setdefault(flat.device, []).append((place, flat))
    for some in by_device.values():
        rows = fused.moments_of([flat for _, flat in some])
        if rows is not None:
            for (place, _), row in zip(some, wanted(rows).unbind(), strict=True):
                known[place] = row
    return known


def _small_at_hand(tensor: Tensor) -> Tensor | None:
    """The flat tensor if it is small and lies in host memory."""
    if tensor.is_sparse or not tensor.is_cpu:
        return None
    flat = in_any_order(tensor)
    return flat if 0 < flat.numel() <= host.SMALL and _is_at_hand(flat) else None


def _exact_moments(flat: Tensor) -> Tensor:
    """All seven without a branch on a value: nothing waits for the device."""
    parts = torch.stack([_exact_piece(piece) for piece in flat.split(_LARGE_CHUNK)])
    return torch.stack(
        [
            *parts[:, :3].sum(0),
            parts[:, 3].amin(),
            parts[:, 4].amax(),
            *parts[:, 5:].sum(0),
        ]
    )


def _exact_piece(piece: Tensor) -> Tensor:
    wide = piece.to(_F64)
    finite, kept = torch.isfinite(wide), _finite(wide)
    return torch.stack(
        [
            finite.sum().to(_F64),
            kept.sum(),
            kept.square().sum(),
            torch.where(finite, wide, torch.inf).amin(),
            torch.where(finite, wide, -torch.inf).amax(),
            (wide == 0).sum().to(_F64),
            (~finite).sum().to(_F64),
        ]
    )


def _sparse_moments(tensor: Tensor) -> Tensor:
    """Of a sparse gradient, with the entries that it leaves out as zeros."""
    tensor = tensor.detach().coalesce()
    values = tensor.values()
    result = moments(values)
    absent = tensor.numel() - values.numel()
    if not has_float64(tensor.device):
        return single_precision.with_zeros(result, absent)
    if absent:
        zero = torch.zeros((), dtype=_F64, device=result.device)
        result = torch.stack(
            [
                result[0] + absent,
                result[1],
                result[2],
                torch.minimum(result[3], zero),
                torch.maximum(result[4], zero),
                result[5] + absent,
                result[6],
            ]
        )
    return result


def touched_rows(tensor: Tensor) -> Tensor:
    """How many rows have an entry other than zero: a scalar."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.numel() == 0:
        return widened(torch.zeros((), device=tensor.device))
    # No mask as large as the tensor is needed; NaN differs from zero.
    low, high = torch.aminmax(plain(tensor).view(len(tensor), -1), dim=1)
    return widened(((low != 0) | (high != 0)).sum())


def squares(tensor: Tensor) -> Tensor:
    """(Σx², count) of the finite entries: float64 of shape (2,)."""
    flat = in_any_order(tensor)
    if not has_float64(flat.device):
        return single_precision.squares(flat)
    if _is_at_hand(flat):
        return host.squares(flat)
    total = torch.zeros(2, dtype=_F64, device=flat.device)
    for piece in flat.split(_LARGE_CHUNK):
        wide = piece.to(_F64)
        total[0] += _finite(wide).square().sum()
        total[1] += torch.isfinite(wide).sum()
    return total


def squares_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of each, as `squares` has them: on a GPU, and of small ones in host memory, at once."""
    known = _fused(tensors, lambda rows: torch.stack([rows[:, 2], rows[:, 0]], 1))
    return _each(tensors, known, host.joined_squares, squares)


def update_products(before: Tensor, after: Tensor, gradient: Tensor) -> Tensor:
    """Of the given coordinates: float64 of shape (6,).

    Σ Δw², Σ g·Δw, Σ g²; their number; of those with a gradient other than zero the number, and how
    many did not change. Coordinates where the change or the gradient is not finite are left out.
    """
    if not has_float64(before.device):
        return single_precision.update_products(before, after, gradient)
    if all(map(_is_at_hand, (before, after, gradient))):
        return host.update_products(before, after, gradient)
    change = after.to(_F64) - before.to(_F64)
    wide = gradient.to(_F64)
    clean = torch.isfinite(change) & torch.isfinite(wide)
    change, wide = torch.where(clean, change, 0.0), torch.where(clean, wide, 0.0)
    given = torch.count_nonzero(wide)
    # Of a product of both the smallest would vanish.
    moved = torch.count_nonzero(torch.logical_and(wide, change))
    return torch.stack(
        [
            change.dot(change),
            wide.dot(change),
            wide.dot(wide),
            clean.sum().to(_F64),
            given.to(_F64),
            (given - moved).to(_F64),
        ]
    )


def _finite(wide: Tensor) -> Tensor:
    return torch.where(torch.isfinite(wide), wide, 0.0)


def magnitudes(tensors: Iterable[Tensor]) -> Tensor:
    """How many entries of each flat tensor are in which octave: of shape (tensors, 128 + 2).

    The outer bins are open; zeros and non-finite entries are in none. Behind them how many entries
    are subnormal, and how many finite. All on one device, and of one dtype.
    """
    return torch.cat([_count_octaves(batch) for batch in _batches(tensors)])


def magnitudes_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of each flat tensor, as `magnitudes` has them, whatever their devices and dtypes."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(place)
    rows: dict[int, Tensor] = {}
    for places in alike.values():
        rows |= zip(places, magnitudes(tensors[place] for place in places), strict=True)
    return [rows[place] for place in range(len(tensors))]


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Together as many as stay in the cache, or are worth a launch."""
    batch: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        batch.append(tensor)
        # The counts of a small tensor take more room than its entries.
        filled += max(tensor.numel(), OCTAVES)
        if filled >= (_CHUNK if tensor.device.type == "cpu" else _LARGE_CHUNK):
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _count_octaves(tensors: list[Tensor]) -> Tensor:
    # A copy: it may be written into.
    joined = torch.cat(tensors)
    wide = joined.dtype == _F64
    bits = joined.view(torch.int64) if wide else joined.to(torch.float32).view(torch.int32)
    width, bias = (52, 1023) if wide else (23, 127)
    # The exponent is an entry's octave: 0 for zeros and subnormal numbers, the largest one for
    # what is not finite.
    bits &= torch.iinfo(bits.dtype).max
    nonzero = bits.clamp_max(1)
    bits >>= width
    # Now 0 is that of zeros alone.
    bits += nonzero
    parts = bits.split([tensor.numel() for tensor in tensors])
    count = _occurrences if bits.device.type == "cpu" else _device_occurrences
    counts = count(parts, 2 * bias + 3)
    second = bias + LOWEST_OCTAVE + 2
    last = second + OCTAVES - 2
    normal = bias + round(math.log2(torch.finfo(joined.dtype).tiny)) + 1
    folded = [
        counts[:, 1:second].sum(1, keepdim=True),
        counts[:, second:last],
        counts[:, last:-1].sum(1, keepdim=True),
        counts[:, 1:normal].sum(1, keepdim=True),
        counts[:, :-1].sum(1, keepdim=True),
    ]
    return widened(torch.cat(folded, 1))


def _occurrences(parts: Sequence[Tensor], kinds: int) -> Tensor:
    """How often each of 0, 1, … kinds − 1 occurs in each part: of shape (parts, kinds)."""
    return torch.stack([torch.bincount(part, minlength=kinds) for part in parts])


def _device_occurrences(parts: Sequence[Tensor], kinds: int) -> Tensor:
    """The same where bincount makes the host wait, to learn the largest number."""
    places = torch.cat([part + row * kinds for row, part in enumerate(parts)]).to(torch.int64)
    counts = torch.zeros(len(parts) * kinds, dtype=torch.int32, device=places.device)
    one = torch.ones((), dtype=torch.int32, device=places.device)
    return counts.scatter_add_(0, places, one.expand(places.shape)).view(-1, kinds)


def count_outside(tensor: Tensor, low: float, high: float) -> Tensor:
    """How many entries are ≤ low or ≥ high: a scalar."""
    tensor = local(tensor.detach())
    if _is_at_hand(tensor):
        return torch.tensor(host.count_outside(tensor, low, high), dtype=_F64, device="cpu")
    tensor = _with_kernels(tensor)
    return widened(((tensor <= low) | (tensor >= high)).sum())


def active_units(output: Tensor, unit_dim: int) -> Tensor:
    """Which units have a non-zero entry: bool of shape (units,)."""
    output = local(output.detach())
    if _is_at_hand(output):
        return host.active_units(output, unit_dim)
    others = [dim for dim in range(output.dim()) if dim != unit_dim % output.dim()]
    return torch.count_nonzero(_with_kernels(output), dim=others) > 0
