"""Rows that came from a device without float64, as those of other devices: on the host."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gradscope.capture.derive import What

F64 = NDArray[np.float64]


def widened(what: What, rows: F64) -> F64:
    """Rows (rows × numbers) as `statistics` has them, of some as `single_precision` does."""
    widen = _WIDEN.get(what)
    return rows if widen is None else widen(rows)


def _moments(rows: F64) -> F64:
    exponent, count, mean, spread, low, high, zeros, nonfinite = rows.T
    unit = np.exp2(exponent)
    total, square = count * mean * unit, (spread + count * mean**2) * unit**2
    return np.stack([count, total, square, low * unit, high * unit, zeros, nonfinite], axis=1)


def _squares(rows: F64) -> F64:
    exponent, square, count = rows.T
    return np.stack([square * np.exp2(2 * exponent), count], axis=1)


def _update(rows: F64) -> F64:
    change, gradient = rows.T[:2]
    exponents = np.stack([2 * change, change + gradient, 2 * gradient], axis=1)
    return np.hstack([rows[:, 2:5] * np.exp2(exponents), rows[:, 5:]])


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
    "buffers": _squares,
    "update": _update,
}
