"""What a GradScaler kept from the optimizer."""

import numpy as np

from gradscope.analysis.robust import Bools
from gradscope.record import Run


def skipped(run: Run) -> Bools:
    """Per recorded step: whether a GradScaler skipped it, as far as that is known."""
    unknown = np.full(len(run.steps), np.nan)
    flags = run.scalars.get("skipped", unknown)
    result: Bools = flags[np.searchsorted(run.steps, run.recorded_steps)] > 0
    return result
