"""Sufficient statistics of tensors in host memory: near one pass, with numpy beside torch.

A tensor is read in pieces that stay in the cache, each quantity by whatever reads it fastest, with
as few calls as can be: pieces drive what a call of torch's needs out of the cache, which then
costs 10 µs (measured, 65,536 entries of float32 in numpy: sum and dot 9 µs each, min and max 8 µs
each, zeros 9 µs). Single precision suffices within a piece, whose sums are added in float64: the
relative error of Σx² is then below 1e-6. Where it does not suffice, a piece is read again in
float64.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_F64 = torch.float64

# Up to here float64 costs no more than the calls.
SMALL = 4_096
# 512 kB of float32.
_PIECE = 131_072
# Of small tensors together: what float64 needs beside them.
_TOGETHER = 65_536
# Numpy's products have threads of their own from some ten thousand entries on; and so few are
# added in single precision.
_ROW = 8_192
# Of smaller magnitudes, squares in float32 lose digits, or are flushed to zero; of larger ones
# their sum overflows.
_SMALLEST, _LARGEST = 1e-13, 1e15
# So that the power of two is a number of float32, and its inverse too.
_HIGHEST_EXPONENT = 126
# Below this share of the mean square the variance is computed in float64.
_LEAST_VARIANCE = 0.05

# What is not finite is looked for in the result. Whatever the user has numpy do about the rest is
# about their own numbers.
_quiet = np.errstate(all="ignore")

Array: TypeAlias = NDArray[np.floating[Any]]
F64: TypeAlias = NDArray[np.float64]
# Given entries that lie one behind the other, and where each tensor begins: a row for each.
Together: TypeAlias = Callable[[Array, NDArray[np.int64]], F64]


def array(tensor: Tensor) -> Array:
    """The real tensor's memory as an array; other formats than single and double are converted."""
    if tensor.dtype not in (torch.float32, _F64):
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else _F64)
    result: Array = tensor.numpy()
    return result


class _Buffer(threading.local):
    """Room for a piece in single precision: fresh memory is dear. Hooks run on several threads."""

    def __init__(self) -> None:
        self.tensor = torch.empty(_PIECE, dtype=torch.float32, device="cpu")
        self.array: Array = self.tensor.numpy()


_buffer = _Buffer()
_ones = {kind: np.ones((_ROW, 1), kind) for kind in (np.dtype("f4"), np.dtype("f8"))}


def _pieces(flat: Tensor) -> Iterator[Array]:
    """Each is valid until the next one is asked for."""
    starts = range(0, flat.numel(), _PIECE)
    if flat.dtype in (torch.float32, _F64) or not flat.is_floating_point():
        whole = array(flat)
        for start in starts:
            yield whole[start : start + _PIECE]
        return
    for start in starts:
        size = min(_PIECE, flat.numel() - start)
        _buffer.tensor[:size].copy_(flat[start : start + size])
        yield _buffer.array[:size]


@_quiet
def moments(flat: Tensor) -> Tensor:
    """Those of a flat real tensor, see `statistics.MOMENTS`."""
    total = sumsq = 0.0
    low, high = math.inf, -math.inf
    count = zeros = 0
    if flat.numel() <= SMALL:
        return _small_moments(array(flat).astype(np.float64))
    for piece in _pieces(flat):
        entries = piece
        least, most = _ends(entries)
        if not math.isfinite(least + most):
            entries = entries[np.isfinite(entries)]
            least, most = _ends(entries)
        low, high = min(low, least), max(high, most)
        count += entries.size
        none = entries == 0
        # Most have none, and to see that is fast.
        if none.any():
            zeros += int(np.count_nonzero(none))
        added, squared = _sums(entries, max(most, -least))
        total, sumsq = total + added, sumsq + squared
    return _row(count, total, sumsq, low, high, zeros, flat.numel() - count)


def _row(*numbers: float) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.float64))


def _ends(entries: Array) -> tuple[float, float]:
    low = np.minimum.reduce(entries, initial=np.inf)
    return float(low), float(np.maximum.reduce(entries, initial=-np.inf))


def _sums(piece: Array, largest: float) -> tuple[float, float]:
    """Σx and Σx² of what is finite."""
    if piece.dtype == np.float32:
        unit = _unit(largest)
        scaled = piece if unit == 1.0 else piece * np.float32(unit)
        total, square = _sum(scaled), _dot(scaled, scaled)
        # If that holds for every piece it holds for the whole.
        if square - total * total / max(piece.size, 1) >= _LEAST_VARIANCE * square:
            return total / unit, square / unit / unit
    wide = piece.astype(np.float64)
    return _sum(wide), _dot(wide, wide)


def _dot(one: Array, other: Array) -> float:
    """Of each row in the arrays' own precision, in float64 over the rows."""
    whole = one.size // _ROW * _ROW
    total = 0.0
    if whole:
        rows = one[:whole].reshape(-1, 1, _ROW) @ other[:whole].reshape(-1, _ROW, 1)
        total = sum(rows.ravel().tolist())
    return total if whole == one.size else total + float(one[whole:] @ other[whole:])


def _sum(one: Array) -> float:
    # As a product with ones half as dear as a sum.
    whole = one.size // _ROW * _ROW
    total = 0.0
    if whole:
        rows = one[:whole].reshape(-1, 1, _ROW) @ _ones[one.dtype]
        total = sum(rows.ravel().tolist())
    return total if whole == one.size else total + float(one[whole:].sum())


def _unit(largest: float) -> float:
    """A power of two that makes it so large that its square is neither lost nor infinite."""
    if largest == 0.0 or _SMALLEST < largest < _LARGEST:
        return 1.0
    exponent = min(max(-math.frexp(largest)[1], -_HIGHEST_EXPONENT), _HIGHEST_EXPONENT)
    return math.ldexp(1.0, exponent)


def _small_moments(wide: F64) -> Tensor:
    size = wide.size
    low, high = _ends(wide)
    if not math.isfinite(low + high):
        wide = wide[np.isfinite(wide)]
        low, high = _ends(wide)
    count = wide.size
    zeros = count - int(np.count_nonzero(wide))
    return _row(count, float(wide.sum()), float(wide @ wide), low, high, zeros, size - count)


@_quiet
def squares(flat: Tensor) -> Tensor:
    """(Σx², count) of a flat real tensor."""
    total, count = 0.0, flat.numel()
    for piece in _pieces(flat):
        square = math.nan if count <= SMALL else _dot(piece, piece)
        # A mean square like that of the smallest magnitude, which zero itself may hide.
        if not piece.size * _SMALLEST**2 <= square < math.inf:
            wide = piece.astype(np.float64)
            square = _dot(wide, wide)
            if not math.isfinite(square):
                wide = wide[np.isfinite(wide)]
                count -= piece.size - wide.size
                square = _dot(wide, wide)
        total += square
    return _row(total, count)


@_quiet
def in_batches(flats: Sequence[Tensor | None], together: Together) -> list[Tensor | None]:
    """A row for each small flat tensor, read with others of its kind.

    None: of what is not there, and where the numbers are not finite.
    """
    rows: list[Tensor | None] = [None] * len(flats)
    alike: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for index, flat in enumerate(flats):
        if flat is not None:
            alike.setdefault(flat.dtype, []).append((index, flat))
    for small in alike.values():
        for batch in _batches(small):
            sizes = [0, *(flat.numel() for _, flat in batch)]
            joined = array(torch.cat([flat for _, flat in batch]))
            found = together(joined, np.cumsum(sizes[:-1]))
            finite = np.isfinite(found.sum(axis=1))
            for place, row in enumerate(torch.from_numpy(found)):
                if finite[place]:
                    rows[batch[place][0]] = row
    return rows


def _batches(small: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """As many together as stay in the cache."""
    batch: list[tuple[int, Tensor]] = []
    filled = 0
    for entry in small:
        batch.append(entry)
        filled += entry[1].numel()
        if filled >= _TOGETHER:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def joined_moments(entries: Array, starts: NDArray[np.int64]) -> F64:
    """The moments of several tensors that lie one behind the other."""
    wide = entries.astype(np.float64)
    none, nothing = wide == 0, np.zeros(len(starts))
    return np.stack(
        [
            np.diff(starts, append=wide.size),
            np.add.reduceat(wide, starts),
            np.add.reduceat(wide * wide, starts),
            np.minimum.reduceat(wide, starts),
            np.maximum.reduceat(wide, starts),
            np.add.reduceat(none, starts, dtype=np.float64) if none.any() else nothing,
            nothing,
        ],
        axis=1,
    )


def joined_squares(entries: Array, starts: NDArray[np.int64]) -> F64:
    """(Σx², count) of several tensors that lie one behind the other."""
    wide = entries.astype(np.float64)
    sums = np.add.reduceat(wide * wide, starts)
    return np.stack([sums, np.diff(starts, append=wide.size)], axis=1)


@_quiet
def update_products(before: Tensor, after: Tensor, gradient: Tensor) -> Tensor:
    """See `statistics.update_products`."""
    entries = array(gradient)
    change = array(after).astype(np.float64)
    change -= array(before)
    found = _products(change, entries)
    if not math.isfinite(sum(found[:3])):
        clean = np.isfinite(change) & np.isfinite(entries)
        found = _products(change[clean], entries[clean])
    return _row(*found)


def _products(change: F64, gradient: Array) -> tuple[float, ...]:
    wide = gradient.astype(np.float64)
    given = gradient != 0
    return (
        _dot(change, change),
        _dot(wide, change),
        _dot(wide, wide),
        change.size,
        int(np.count_nonzero(given)),
        int(np.count_nonzero(given & (change == 0))),
    )


@_quiet
def count_outside(tensor: Tensor, low: float, high: float) -> int:
    """How many entries are ≤ low or ≥ high."""
    entries = array(tensor)
    return int(np.count_nonzero((entries <= low) | (entries >= high)))


def active_units(output: Tensor, unit_dim: int) -> Tensor:
    """Which units have a non-zero entry: bool of shape (units,)."""
    entries = output.resolve_conj().numpy() if output.is_complex() else array(output)
    others = tuple(dim for dim in range(entries.ndim) if dim != unit_dim % entries.ndim)
    nonzero = entries != 0
    return torch.from_numpy(np.atleast_1d(nonzero.any(axis=others)))
