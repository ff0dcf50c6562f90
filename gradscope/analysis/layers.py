"""Parameters and the layers that hold them: names and shares."""

import numpy as np

from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run

ROOT = "(root)"


def module_of(parameter: str) -> str:
    """The qualified name of the module that holds the parameter."""
    return parameter.rpartition(".")[0] or ROOT


def activations(run: Run, types: frozenset[str]) -> list[int]:
    """The columns of the activations of these types.

    Raises UnjudgedError where no activation is a module: functional ones are not seen.
    """
    table = run.modules
    if not any(entity.group == "activation" for entity in table.entities):
        message = "no activation is a module of the model, and functional ones are not seen"
        raise UnjudgedError(message)
    return [column for column, entity in enumerate(table.entities) if entity.type in types]


def trainable_share(run: Run, which: Bools) -> float:
    """The share of these parameters in all trainable entries."""
    table = run.parameters
    trainable = (table["requires_grad"] == 1).any(axis=0)
    sizes = np.array([entity.numel for entity in table.entities], dtype=np.float64)
    total = sizes[trainable].sum()
    return float(sizes[which & trainable].sum() / total) if total else 0.0


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
