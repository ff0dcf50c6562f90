"""What is known of the optimizers: their settings, and the learning rate at each step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.robust import F64
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run

# Their weight decay is no part of the gradient.
_DECOUPLED = frozenset({"AdamW", "Lion", "Muon"})


@dataclass(frozen=True, slots=True)
class Settings:
    """Those of an optimizer's first parameter group, as they were at its first step."""

    type: str
    values: Mapping[str, Any]

    def number(self, name: str) -> float:
        """A setting as a number; NaN where it has none."""
        value = self.values.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    @property
    def is_adaptive(self) -> bool:
        """Whether the size of its steps does not follow that of the gradient."""
        return "SGD" not in self.type

    @property
    def is_adam(self) -> bool:
        """Whether it divides by √v̂ + ε."""
        return "Adam" in self.type

    @property
    def decays_decoupled(self) -> bool:
        """Whether weights decay beside the gradient's step, and not by way of it."""
        return self.type in _DECOUPLED or bool(self.values.get("decoupled_weight_decay"))


def optimizers(run: Run) -> tuple[Settings, ...]:
    """Those that stepped; none where nothing is known of them."""
    coverage = run.meta.get("coverage")
    known = coverage.get("optimizers", ()) if isinstance(coverage, Mapping) else ()
    return tuple(Settings(str(each.get("type", "")), each) for each in known)


def take_turns(run: Run) -> bool:
    """Whether several step: each may have a loss, and parameters, of its own."""
    return len(optimizers(run)) > 1


def only_optimizer(run: Run) -> Settings:
    """The one that trains the model.

    Raises UnjudgedError where there are others: whose a parameter is, is not known.
    """
    known = optimizers(run)
    if len(known) != 1:
        found = "no optimizer is known" if not known else f"{len(known)} optimizers train the model"
        message = f"{found}, and the settings of one are needed"
        raise UnjudgedError(message)
    return known[0]


def rates_when_recorded(run: Run) -> F64:
    """Per recorded step: the learning rate of the first group; NaN: not known."""
    rates = run.scalars["learning_rate"].astype(np.float64)
    at: F64 = rates[np.searchsorted(run.steps, run.recorded_steps)]
    return at
