"""Parameters and the layers that hold them: names and shares."""

import numpy as np

from gradscope.analysis.robust import Bools
from gradscope.record import Run

_ROOT = "(root)"


def module_of(parameter: str) -> str:
    """The qualified name of the module that holds the parameter."""
    return parameter.rpartition(".")[0] or _ROOT


def trainable_share(run: Run, which: Bools) -> float:
    """The share of these parameters in all trainable entries."""
    table = run.parameters
    trainable = (table["requires_grad"] == 1).any(axis=0)
    sizes = np.array([entity.numel for entity in table.entities], dtype=np.float64)
    total = sizes[trainable].sum()
    return float(sizes[which & trainable].sum() / total) if total else 0.0
