"""Rows that came from a device without float64, as those of other devices: on the host."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gradscope.capture.derive import What

F64 = NDArray[np.float64]


def widened(what: What, row: F64) -> F64:
    """The row as `statistics` has it, of one as `single_precision` does."""
    widen = _WIDEN.get(what)
    return row if widen is None else widen(row)


def _moments(row: F64) -> F64:
    exponent, count, mean, spread, low, high, zeros, nonfinite = row
    unit = np.exp2(exponent)
    total, square = count * mean * unit, (spread + count * mean**2) * unit**2
    return np.array([count, total, square, low * unit, high * unit, zeros, nonfinite])


def _squares(row: F64) -> F64:
    exponent, square, count = row
    return np.array([square * np.exp2(2 * exponent), count])


def _update(row: F64) -> F64:
    change, gradient = row[:2]
    exponents = np.array([2 * change, change + gradient, 2 * gradient])
    return np.concatenate([row[2:5] * np.exp2(exponents), row[5:]])


_WIDEN: Mapping[What, Callable[[F64], F64]] = {
    "gradient": _moments,
    "output": _moments,
    "output_gradient": _moments,
    "time": _moments,
    "time_first": _moments,
    "time_middle": _moments,
    "time_last": _moments,
    "signal": _moments,
    "weight": _squares,
    "update": _update,
}
