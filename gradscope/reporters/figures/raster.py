"""Layers × steps as a raster of equally wide columns in which no one-step event gets lost."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.record import FloatArray, StepArray

# As many as a screen shows side by side.
MAX_COLUMNS = 800
# So many times longer than those before and after it, a gap between recorded steps is a pause.
_PAUSE = 3

Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Columns:
    """Equally wide columns that divide the steps from `left` to `right`.

    `members` holds, for each column, which of the recorded steps it stands for: those within
    it, else the nearest one; none in a pause, where a step reaches no farther than usual.
    """

    left: float
    right: float
    members: tuple[Indices, ...]

    @property
    def width(self) -> float:
        """Of one column, in steps."""
        return (self.right - self.left) / len(self.members)

    @property
    def empty(self) -> list[tuple[float, float]]:
        """From where to where nothing was recorded for unusually long."""
        found: list[tuple[float, float]] = []
        for column, members in enumerate(self.members):
            if not members.size:
                start = self.left + column * self.width
                adjoins = found and np.isclose(found[-1][1], start)
                begun = found.pop()[0] if adjoins else start
                found.append((begun, start + self.width))
        return found


def columns_of(steps: StepArray, max_columns: int = MAX_COLUMNS) -> Columns:
    """The columns in which recorded steps are drawn, at their real distances."""
    count, width = _grid(steps, max_columns)
    left = float(steps[0]) - width / 2
    # Rounding must not push the last step out.
    column_of_step = np.minimum(((steps - left) / width).astype(int), count - 1)
    own = np.split(np.arange(len(steps)), np.searchsorted(column_of_step, np.arange(1, count)))

    centers = left + width * (np.arange(count) + 0.5)
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, centers)
    before, after = _reaches(steps)
    away = centers - steps[nearest]
    reached = (-before[nearest] <= away) & (away <= after[nearest])
    members = (
        within if within.size else nearest[column : column + 1][reached[column : column + 1]]
        for column, within in enumerate(own)
    )
    return Columns(left, left + count * width, tuple(members))


def _grid(steps: StepArray, max_columns: int) -> tuple[int, float]:
    """How many columns of which width: one per step if they fit."""
    if len(steps) == 1:
        return 1, 1.0
    span = float(steps[-1] - steps[0])
    finest = float(np.diff(steps).min())
    count = round(span / finest) + 1
    if count <= max_columns:
        return count, finest
    return max_columns, span / (max_columns - 1)


def _reaches(steps: StepArray) -> tuple[F64, F64]:
    """How far each step is drawn to its left and its right."""
    gaps, paused = np.diff(steps).astype(np.float64), pauses(steps)
    usual = np.median(gaps[~paused]) if gaps.size else 0.0
    reach = np.where(paused, usual, gaps) / 2
    return np.append(0, reach), np.append(reach, 0)


def pauses(steps: StepArray) -> Flags:
    """Which gaps between the steps are unusually long."""
    gaps = np.diff(steps)
    padded = np.pad(gaps, 1)
    around = np.maximum(padded[:-2], padded[2:])
    found: Flags = (around > 0) & (gaps > _PAUSE * around)
    return found


def interrupted(steps: StepArray, values: F64) -> tuple[F64, F64]:
    """The steps and their values (steps first) with a NaN in each pause: no line spans it."""
    after = np.flatnonzero(pauses(steps)) + 1
    at = np.insert(steps.astype(np.float64), after, (steps[after] + steps[after - 1]) / 2)
    return at, np.insert(values, after, np.nan, axis=0)


@dataclass(frozen=True, eq=False, slots=True)
class Raster:
    """Arrays of shape (rows, columns).

    `logarithm` is log10 of the value, NaN where there is none. A column of several steps holds
    the value farthest from the row's median; `zero` and `nonfinite` say that any of them was.
    """

    columns: Columns
    logarithm: F64
    zero: Flags
    nonfinite: Flags

    @property
    def unmeasured(self) -> Flags:
        """Where a step was recorded, but not this row."""
        recorded = [members.size > 0 for members in self.columns.members]
        missing: Flags = np.isnan(self.logarithm) & ~self.zero & ~self.nonfinite & recorded
        return missing


def rasterize(values: FloatArray, nonfinite: Flags, columns: Columns) -> Raster:
    """The raster of `values` (steps, rows), which are not negative; NaN: not measured."""
    broken = nonfinite | np.isinf(values)
    logarithms = logarithm(values)
    shape = (values.shape[1], len(columns.members))
    pooled, zeros, breaks = np.full(shape, np.nan), np.zeros(shape, bool), np.zeros(shape, bool)
    medians = row_medians(logarithms)
    for column, members in enumerate(columns.members):
        if members.size:
            pooled[:, column] = _extreme(logarithms[members], medians)
            zeros[:, column] = (values[members] == 0).any(axis=0)
            breaks[:, column] = broken[members].any(axis=0)
    return Raster(columns, pooled, zeros, breaks)


def logarithm(values: FloatArray) -> F64:
    """log10 where there is one, else NaN."""
    positive = np.isfinite(values) & (values > 0)
    result = np.full(values.shape, np.nan)
    np.log10(values.astype(np.float64), out=result, where=positive)
    return result


def spaced(marked: StepArray, steps: StepArray, across: int = 90) -> list[int]:
    """Of the marked steps as many as fit side by side as marks; none stands alone unmarked."""
    distance = (steps[-1] - steps[0]) / across
    kept: list[int] = []
    for step in marked.tolist():
        if not kept or step - kept[-1] >= distance:
            kept.append(step)
    return kept


def row_medians(logarithms: F64) -> F64:
    """The median over the steps of each row (steps, rows); NaN where there is none."""
    known = [column[np.isfinite(column)] for column in logarithms.T]
    return np.array([np.median(column) if column.size else np.nan for column in known])


def _extreme(members: F64, medians: F64) -> F64:
    """Of each row the value farthest from its median."""
    distance = np.nan_to_num(np.abs(members - medians), nan=-1)
    farthest = distance.argmax(axis=0)
    chosen: F64 = np.take_along_axis(members, farthest[None, :], axis=0)[0]
    return chosen
