"""What small steps promised by their gradients, and what the loss did instead."""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.robust import F64, Bools, measured, median, noise
from gradscope.analysis.updates import held_weights
from gradscope.record import Run, StepArray

# Of the steps so many; a level is the median of so many losses.
_MOST = 0.8
_LEVEL = 5
_QUARTERS = 4


@dataclass(frozen=True, eq=False, slots=True)
class Promises:
    """The steps from the first on of which most were small, and recorded one after the other.

    By the first order of Taylor's series they lower the loss by `fall` in all; its level changed
    by `change`; `chance` is the deviation of a single loss. `shares` is change over fall, negative
    where the loss fell, in each quarter of the steps. `turn` is the typical cosine of a gradient
    with that before it: below zero where steps overshoot.
    """

    steps: StepArray
    fall: float
    change: float
    chance: float
    shares: F64
    turn: float


def promises(run: Run, small: float) -> Promises:
    """Of the weights' steps; `small` is the share of the loss that one may promise at most."""
    table, held = run.parameters, held_weights(run)
    parts: F64 = (
        table["update_gradient_cosine"].astype(np.float64)
        * table["update_norm"]
        * table["grad_norm"]
    )[:, held]
    promised = np.where(measured(parts), parts, 0.0).sum(axis=1)[:-1]
    losses = run.scalars["loss"].astype(np.float64)
    at = losses[np.searchsorted(run.steps, table.steps)]
    finite = np.isfinite(at)
    at = np.where(finite, at, 0.0)
    judged: Bools = (np.diff(table.steps) == 1) & finite[1:] & finite[:-1]
    judged &= (promised < 0) & (-promised < small * np.abs(at[:-1]))
    shares = np.cumsum(judged) / np.arange(1, judged.size + 1)
    most = np.flatnonzero(shares >= _MOST)
    stop = int(most[-1]) + 1 if most.size else 0
    judged, known = judged[:stop], at[: stop + 1][finite[: stop + 1]]
    turns = median(table["grad_previous_cosine"][1 : stop + 1, held], axis=1)[judged]
    turns = turns[measured(turns)]
    change = np.median(known[-_LEVEL:]) - np.median(known[:_LEVEL]) if stop else np.nan
    return Promises(
        table.steps[:stop][judged],
        -float(promised[:stop][judged].sum()),
        float(change),
        noise(losses[np.isfinite(losses)]),
        _shares(known, np.where(judged, -promised[:stop], 0.0)),
        float(np.median(turns)) if turns.size else np.nan,
    )


def _shares(levels: F64, falls: F64) -> F64:
    """The change of the level over the fall that was promised, by quarters."""
    parts = np.array_split(levels, _QUARTERS)
    changes = [np.median(p[-_LEVEL:]) - np.median(p[:_LEVEL]) if p.size else np.nan for p in parts]
    promised = [part.sum() for part in np.array_split(falls, _QUARTERS)]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: F64 = np.array(changes) / np.array(promised)
    return shares
