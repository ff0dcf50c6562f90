"""How much of a step is weight decay."""

import numpy as np

from gradscope.analysis.optimizers import Settings, rates_when_recorded
from gradscope.analysis.robust import F64, Bools
from gradscope.record import Run


def decay_share(run: Run, settings: Settings, which: Bools) -> F64:
    """Per recorded step and chosen parameter: the share of weight decay, between 0 and 1.

    Decoupled (AdamW): of the length of the change. Else the decay is added to the gradient: of the
    lengths of the two. NaN: not known. By the settings of the optimizer's first group.
    """
    table = run.parameters
    strength = settings.number("weight_decay")
    weights = table["weight_norm"][:, which].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if settings.decays_decoupled:
            decay = rates_when_recorded(run)[:, None] * strength * weights
            share: F64 = decay / table["update_norm"][:, which].astype(np.float64)
        else:
            decay = strength * weights
            share = decay / (decay + table["grad_norm"][:, which].astype(np.float64))
    return np.minimum(share, 1.0)
