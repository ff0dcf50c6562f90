"""What biases' gradients hold beside the sum of what arrived at their layers' outputs."""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.robust import F64, measured, median
from gradscope.record import Entity, Run, StepArray

# Before a norm a bias's gradient is what rounding leaves of zero, this far below the others.
_ROUND_OFF = 1e-5


@dataclass(frozen=True, eq=False, slots=True)
class Balance:
    """Biases whose gradient can be held against its parts; arrays of shape (steps, biases).

    `share` is `grad_balance`, `cosine` is `grad_balance_cosine`. NaN: not measured.
    """

    entities: tuple[Entity, ...]
    steps: StepArray
    norm: F64
    share: F64
    cosine: F64
    previous: F64

    @property
    def arrived(self) -> F64:
        """The norm of the sum of what arrived at the output in the step."""
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes: F64 = np.abs(self.cosine / self.share) * self.norm
        return np.where(np.isfinite(sizes), sizes, np.nan)


def balance(run: Run) -> Balance:
    """The balance of the run; without a column where none was measured."""
    table = run.parameters
    # Of most parameters there is none.
    held = (table["in_optimizer"] == 1).any(axis=0)
    told = np.flatnonzero(measured(table["grad_balance_cosine"]).any(axis=0) & held)
    norm = table["grad_norm"][:, told].astype(np.float64)
    norm = np.where(measured(table["grad_balance_cosine"][:, told]) & (norm > 0), norm, np.nan)
    typical = median(norm, axis=0)
    columns = told[typical > _ROUND_OFF * typical.max(where=measured(typical), initial=0.0)]
    return Balance(
        tuple(table.entities[column] for column in columns),
        table.steps,
        table["grad_norm"][:, columns].astype(np.float64),
        table["grad_balance"][:, columns].astype(np.float64),
        table["grad_balance_cosine"][:, columns].astype(np.float64),
        table["grad_previous_cosine"][:, columns].astype(np.float64),
    )
