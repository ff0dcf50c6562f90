"""Layers × steps as a raster of equally wide columns in which no one-step event gets lost."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.record import FloatArray, StepArray

# As many as a screen shows side by side.
MAX_COLUMNS = 800

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Raster:
    """Arrays of shape (rows, columns); the columns divide the steps from `left` to `right`.

    `logarithm` is log10 of the value, NaN where there is none. A column of several steps holds
    the value farthest from the row's median; `zero` and `nonfinite` say that any of them was.
    """

    logarithm: NDArray[np.float64]
    zero: Flags
    nonfinite: Flags
    left: float
    right: float


def rasterize(
    values: FloatArray, nonfinite: Flags, steps: StepArray, max_columns: int = MAX_COLUMNS
) -> Raster:
    """The raster of `values` (steps, rows), which are not negative; NaN: not measured.

    A column without a recorded step shows the nearest one.
    """
    broken = nonfinite | np.isinf(values)
    positive = np.isfinite(values) & (values > 0)
    logarithm = np.full(values.shape, np.nan)
    np.log10(values.astype(np.float64), out=logarithm, where=positive)

    columns, width = _columns(steps, max_columns)
    left = float(steps[0]) - width / 2
    centers = left + width * (np.arange(columns) + 0.5)
    nearest = np.abs(steps[:, None] - centers[None, :]).argmin(axis=0)
    # Rounding must not push the last step out.
    column_of_step = np.minimum(((steps - left) / width).astype(int), columns - 1)

    pooled = logarithm[nearest].T.copy()
    zeros = (values == 0)[nearest].T.copy()
    breaks = broken[nearest].T.copy()
    medians = _medians(logarithm)
    for column in np.unique(column_of_step):
        members = column_of_step == column
        pooled[:, column] = _extreme(logarithm[members], medians)
        zeros[:, column] = (values[members] == 0).any(axis=0)
        breaks[:, column] = broken[members].any(axis=0)
    return Raster(pooled, zeros, breaks, left, left + columns * width)


def _columns(steps: StepArray, max_columns: int) -> tuple[int, float]:
    """How many columns of which width: one per step if they fit."""
    if len(steps) == 1:
        return 1, 1.0
    span = float(steps[-1] - steps[0])
    finest = float(np.diff(steps).min())
    columns = round(span / finest) + 1
    if columns <= max_columns:
        return columns, finest
    return max_columns, span / (max_columns - 1)


def _medians(logarithm: NDArray[np.float64]) -> NDArray[np.float64]:
    known = [column[np.isfinite(column)] for column in logarithm.T]
    return np.array([np.median(column) if column.size else np.nan for column in known])


def _extreme(members: NDArray[np.float64], medians: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row the value farthest from its median."""
    distance = np.nan_to_num(np.abs(members - medians), nan=-1)
    farthest = distance.argmax(axis=0)
    chosen: NDArray[np.float64] = np.take_along_axis(members, farthest[None, :], axis=0)[0]
    return chosen
