"""What was measured of the model's input, its output and the target."""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.robust import F64, measured
from gradscope.record import Entity, Run, StepArray

# A single batch may be an exception.
_FEW = 5


@dataclass(frozen=True, eq=False, slots=True)
class Signal:
    """One signal's quantities by name, each of shape (steps,); NaN: not measured."""

    entity: Entity
    steps: StepArray
    columns: dict[str, F64]

    def __getitem__(self, quantity: str) -> F64:
        known = self.columns.get(quantity)
        return np.full(len(self.steps), np.nan) if known is None else known

    def first(self, quantity: str) -> float:
        """The first value that was measured; NaN without."""
        values = self[quantity]
        known = values[measured(values)]
        return float(known[0]) if known.size else float("nan")

    def last(self, quantity: str) -> float:
        """The median of the last few that were measured; NaN without."""
        values = self[quantity]
        known = values[measured(values)][-_FEW:]
        return float(np.median(known)) if known.size else float("nan")

    def typical(self, quantity: str) -> float:
        """The median of what was measured; NaN without."""
        values = self[quantity]
        known = values[measured(values)]
        return float(np.median(known)) if known.size else float("nan")

    def span(self, quantity: str) -> tuple[int, int]:
        """The first and the last step at which it was measured; 0 and 0 without."""
        known = self.steps[measured(self[quantity])]
        return (int(known[0]), int(known[-1])) if known.size else (0, 0)


def signal(run: Run, name: str) -> Signal | None:
    """The signal of that name; None where it was not seen."""
    table = run.signals
    if name not in table.names:
        return None
    at = table.names.index(name)
    columns = {quantity: table[quantity][:, at].astype(np.float64) for quantity in table.quantities}
    return Signal(table.entities[at], table.steps, columns)
