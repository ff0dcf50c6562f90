"""Parameters and the layers that hold them: names and shares."""

import numpy as np

from gradscope.analysis.robust import Bools, measured
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run

ROOT = "(root)"


def module_of(parameter: str) -> str:
    """The qualified name of the module that holds the parameter."""
    return parameter.rpartition(".")[0] or ROOT


def part_of(entity: str) -> str:
    """The part of the model behind an entity's name: without the number of a module's use.

    A functional call, `layers.3/relu#0`, is a part of its own.
    """
    return entity if "/" in entity else entity.partition("#")[0]


def activations(run: Run, types: frozenset[str]) -> list[int]:
    """The columns of the activations of these types.

    Raises UnjudgedError where none was seen.
    """
    table = run.modules
    if not any(entity.group == "activation" for entity in table.entities):
        message = (
            "no activation was seen, neither a module nor a function that the forward calls; "
            "in compiled models only modules are seen"
        )
        raise UnjudgedError(message)
    return [column for column, entity in enumerate(table.entities) if entity.type in types]


def trainable_share(run: Run, which: Bools) -> float:
    """The share of these parameters in all trainable entries."""
    table = run.parameters
    trainable = (table["requires_grad"] == 1).any(axis=0)
    sizes = np.array([entity.numel for entity in table.entities], dtype=np.float64)
    total = sizes[trainable].sum()
    return float(sizes[which & trainable].sum() / total) if total else 0.0


def forgotten(run: Run, last: slice) -> Bools:
    """Per parameter: trainable, with a gradient, in no optimizer in these steps, and unmoved."""
    table = run.parameters
    trainable = (table["requires_grad"][last] == 1).all(axis=0)
    outside = trainable & (table["in_optimizer"][last] == 0).all(axis=0)
    # Where optimizers take turns, gradients arrive on one's own.
    reached = (table["grad_missing"][last] == 0).any(axis=0)
    found: Bools = outside & reached & _unmoved(run)
    # A gradient that was left from before is not one that arrives.
    for index in np.flatnonzero(found):
        found[index] = not idle(run, table.names[index], last)
    return found


def _unmoved(run: Run) -> Bools:
    """Whose weights have the same norm at every step that they were in no optimizer."""
    norms = run.parameters["weight_norm"]
    known = (run.parameters["in_optimizer"] == 0) & measured(norms)
    low, high = np.where(known, norms, np.inf), np.where(known, norms, -np.inf)
    same: Bools = low.min(axis=0) == high.max(axis=0)
    return same


def idle(run: Run, parameter: str, steps: slice) -> bool:
    """Whether the parameter's module is known, and no gradient arrived at its output then.

    A head that this phase does not use, an expert that was not chosen, a layer that is resting.
    """
    modules = run.modules
    owner = module_of(parameter)
    # Of a layer without a hook of its own, the nearest around it tells.
    while owner not in modules.names and "." in owner:
        owner = module_of(owner)
    if owner not in modules.names:
        return False
    row = modules.names.index(owner)
    # Of an empty batch, as an expert gets that no token chose, there is nothing to measure.
    measured_some = ~np.isnan(modules["output_grad_norm"][steps, row])
    broken = np.nan_to_num(modules["output_grad_nonfinite"][steps, row]) > 0
    return not (measured_some | broken).any()
