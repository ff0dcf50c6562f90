"""The gradient along time: at the first, the middle and the last step of recurrent layers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence
from gradscope.analysis.robust import F64, Bools, measured
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Entity, Run, StepArray

# Over fewer steps it is no matter of time.
_FEWEST_STEPS = 10
# What is 0 is below float32's smallest subnormal number, or that of a narrower dtype.
_SMALLEST = 1.4e-45


@dataclass(frozen=True, eq=False, slots=True)
class TimeProfile:
    """Of one recurrent layer, or cell: per measured step the norms along its sequences.

    `growth` is log10 of the total gradient at the first time step over that at the last;
    negative: it fades on its way back through time. `is_steady`: that at the middle time step
    lies between them.
    """

    entity: Entity
    steps: StepArray
    time_steps: float
    growth: F64
    is_steady: Bools
    # At some of its first steps it has faded below what its dtype holds.
    has_zeros: Bools
    # Entries of the gradient along time that are NaN or infinite, though it came in finite.
    overflows: Bools

    def per_step(self, growth: float) -> float:
        """What the growth is per time step."""
        return float(10.0 ** (growth / (self.time_steps - 1)))

    def evidence(self, where: Bools, growth: float, limit: float) -> Evidence:
        """The first step's gradient over the last's, as evidence."""
        steps = self.steps[where]
        return Evidence(
            "time_grad_first / time_grad_last",
            self.entity.name,
            int(steps[0]),
            int(steps[-1]),
            10.0**growth,
            limit,
        )


def time_profiles(run: Run) -> list[TimeProfile]:
    """The profiles. Raises UnjudgedError where no sequence was long enough."""
    found = list(_profiles(run))
    if not found:
        message = (
            f"no recurrent layer with a gradient at the last of {_FEWEST_STEPS} or more time steps"
        )
        raise UnjudgedError(message)
    return found


def _profiles(run: Run) -> Iterator[TimeProfile]:
    table = run.modules
    names = ("time_grad_first", "time_grad_middle", "time_grad_last", "time_steps")
    for column in np.flatnonzero(measured(table["time_grad_last"]).any(axis=0)):
        first, middle, last, length = (table[name][:, column].astype(np.float64) for name in names)
        rows = np.flatnonzero((last > 0) & (length >= _FEWEST_STEPS))
        if not rows.size:
            continue
        ends = np.stack([first[rows], middle[rows], last[rows]])
        broken_inside = table["time_grad_nonfinite"][rows, column] > 0
        arrived_broken = table["output_grad_nonfinite"][rows, column] > 0
        # Where no finite entry is left it is NaN, and stays so.
        logs = np.log10(np.maximum(ends, _SMALLEST))
        low, high = np.minimum(logs[0], logs[2]), np.maximum(logs[0], logs[2])
        yield TimeProfile(
            table.entities[column],
            table.steps[rows],
            float(np.median(length[rows])),
            logs[0] - logs[2],
            (low <= logs[1]) & (logs[1] <= high),
            ends[0] == 0,
            broken_inside & ~arrived_broken,
        )
