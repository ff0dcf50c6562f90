"""Statistics over measured values only: the one place where rules meet NaN."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Numbers = NDArray[np.floating[Any]]


def measured(values: Numbers) -> Bools:
    """Where something was measured."""
    known: Bools = ~np.isnan(values)
    return known


def median(values: Numbers, axis: int) -> F64:
    """The median of what was measured; NaN where nothing was."""
    wide = values.astype(np.float64)
    known = measured(wide).any(axis=axis)
    if not values.shape[axis]:
        return np.full(known.shape, np.nan)
    # An all-NaN slice is a fact here, not a mistake: it must not warn.
    filled = np.where(np.expand_dims(known, axis), wide, 0.0)
    result: F64 = np.where(known, np.nanmedian(filled, axis=axis), np.nan)
    return result


def most(holds: Bools, values: Numbers, axis: int) -> Bools:
    """Whether it holds for more than half of what was measured: what a median is, in less time."""
    known = measured(values)
    result: Bools = (holds & known).sum(axis=axis) > known.sum(axis=axis) / 2
    return result


def at_first(values: Numbers) -> F64:
    """Per column the first value that was measured; NaN where nothing was."""
    known = measured(values)
    rows = known.argmax(axis=0) if len(values) else np.zeros(values.shape[1], np.intp)
    first: F64 = np.full(values.shape[1], np.nan)
    some = known.any(axis=0)
    first[some] = values[rows[some], np.flatnonzero(some)]
    return first


def at_last(values: Numbers, amount: int = 1) -> F64:
    """Per column the last values that were measured, of shape (amount, columns); NaN before them.

    Of optimizers that take turns only one is measured in a step: the last row may be another's.
    """
    last: F64 = np.full((amount, values.shape[1]), np.nan)
    for column, known in enumerate(measured(values).T):
        found = values[known, column][-amount:]
        last[amount - found.size :, column] = found
    return last


def since(holds: Bools) -> int:
    """The index from which on it holds without a break; the length where it does not at last."""
    broken = np.flatnonzero(~holds)
    return int(broken[-1]) + 1 if broken.size else 0


def noise(values: F64) -> float:
    """The standard deviation of the noise in a curve, whatever its trend.

    From the differences of neighbours by how far they are from their median, as a single outlier
    must not count (MAD of a normal: 0.6745 σ; a difference has twice the variance).
    """
    if values.size < 2:  # noqa: PLR2004  (no neighbours)
        return 0.0
    steps = np.diff(values)
    return float(np.median(np.abs(steps - np.median(steps))) / 0.6745 / np.sqrt(2.0))
