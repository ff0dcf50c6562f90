"""How far each step moves the weights, relative to what they are or should be."""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.robust import F64, Bools, at_first, measured
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Entity, Run, StepArray

# Biases and the scales of norms start at 0 or 1 and move freely; of an embedding only some rows
# are touched.
_WEIGHTS = frozenset({"weight", "attention", "adapter", "expert"})


@dataclass(frozen=True, eq=False, slots=True)
class Updates:
    """The updates of the weights that an optimizer holds; arrays of shape (steps, weights).

    `sizes` are norms of the change over the norm of the weight, or over that of PyTorch's default
    initialization where the weight is smaller: of what starts near zero the ratio alone says
    nothing. NaN: not measured.
    """

    entities: tuple[Entity, ...]
    steps: StepArray
    sizes: F64
    # Per weight: its first norm, or that of the default initialization where that is larger.
    initial: F64
    # Per recorded step: how many steps it stands for, up to the next record.
    spans: F64

    @property
    def largest(self) -> F64:
        """Per recorded step: the largest size, 0 where none was measured."""
        known = np.where(measured(self.sizes), self.sizes, 0.0)
        largest: F64 = known.max(axis=1, initial=0.0)
        return largest

    def share_of_steps(self, holds: Bools) -> float:
        """The share of the steps that these recorded ones stand for."""
        return float(self.spans[holds].sum() / self.spans.sum())


def held_weights(run: Run) -> Bools:
    """Per parameter: a trainable matrix or kernel in an optimizer."""
    table = run.parameters
    weights = [entity.group in _WEIGHTS and len(entity.shape) > 1 for entity in table.entities]
    trainable, optimized = table["requires_grad"] == 1, table["in_optimizer"] == 1
    held: Bools = np.array(weights, dtype=bool) & trainable.any(axis=0) & optimized.any(axis=0)
    return held


def updates(run: Run) -> Updates:
    """The updates. Raises UnjudgedError where none of a weight was measured."""
    table = run.parameters
    held = held_weights(run) & measured(table["update_norm"]).any(axis=0)
    if not held.any():
        message = "no update of a weight in an optimizer was measured"
        raise UnjudgedError(message)
    entities = tuple(table.entities[index] for index in np.flatnonzero(held))
    # Entries from U(±1/√fan_in) in as many rows as there are units.
    default = np.sqrt([entity.shape[0] / 3 for entity in entities])
    norms = table["weight_norm"][:, held].astype(np.float64)
    before = np.fmax(norms, default)
    change = table["update_norm"][:, held].astype(np.float64)
    with np.errstate(invalid="ignore"):
        # Both are infinite where float32 could not hold them.
        sizes = change / before
    initial = np.fmax(at_first(norms), default)
    return Updates(entities, table.steps, sizes, initial, spans(run))


def spans(run: Run) -> F64:
    """Per recorded step: how many of the steps seen it stands for, up to the next record."""
    recorded = run.parameters.steps
    ends = np.append(recorded[1:], max(int(run.steps[-1]), int(recorded[-1])) + 1)
    lengths: F64 = (ends - recorded).astype(np.float64)
    return lengths
