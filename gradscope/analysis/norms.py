"""The gradient's global norm over the steps."""

import numpy as np

from gradscope.analysis.robust import F64
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.words import count
from gradscope.record import Run, StepArray


def global_norms(run: Run, fewest: int) -> tuple[StepArray, F64, str]:
    """Steps, finite norms above zero, and the name of the scalar that they are of.

    That before clipping where it is known, of every step; else of the recorded steps what the
    optimizer was given. Raises UnjudgedError where there are fewer than `fewest`.
    """
    most = 0
    for name in ("grad_norm_before_clip", "grad_norm"):
        if name not in run.scalars:
            continue
        norms = run.scalars[name].astype(np.float64)
        known = np.isfinite(norms) & (norms > 0)
        if known.sum() >= fewest:
            return run.steps[known], norms[known], name
        most = max(most, int(known.sum()))
    message = f"the gradient's norm is known of {count(most, 'step')}, {fewest} are needed"
    raise UnjudgedError(message)
