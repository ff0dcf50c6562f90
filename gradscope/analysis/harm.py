"""Evidence of harm: whether the loss got anywhere, and which layers in effect stand still.

Severity means harm. Symptoms alone, however extreme, are information: on healthy trainings
ungated rules raise an alarm in 36 to 72 % of cases (DeepDiagnosis and DeepLocalize on
AUTOTRAINER's models; docs/decisions/0005).
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.finding import Severity
from gradscope.analysis.robust import measured, median, noise
from gradscope.analysis.words import number
from gradscope.record import Run


class LossVerdict(Enum):
    """What the loss says of the training."""

    UNKNOWN = "unknown"  # not seen, too short, or within its noise
    PROVES_NOTHING = "proves nothing"  # the user said that it is not the aim
    LEARNING = "learning"
    CONVERGED = "converged"
    STUCK = "stuck"
    NONFINITE = "non-finite"


@dataclass(frozen=True, slots=True)
class Progress:
    """How the loss went: the verdict, and the medians it rests on (NaN: not known)."""

    verdict: LossVerdict
    start: float
    end: float

    @property
    def failed(self) -> bool:
        """Whether the loss proves that training does not work."""
        return self.verdict in {LossVerdict.STUCK, LossVerdict.NONFINITE}

    @property
    def words(self) -> str:
        """The verdict as a clause of a sentence."""
        if self.verdict is LossVerdict.STUCK:
            return f"the loss is stuck ({number(self.start)} at first, {number(self.end)} at last)"
        if self.verdict is LossVerdict.NONFINITE:
            return "the loss is no longer a finite number"
        if self.verdict is LossVerdict.UNKNOWN:
            return "whether the loss suffers is not known"
        if self.verdict is LossVerdict.PROVES_NOTHING:
            return "the loss is not a measure of progress here"
        return f"the loss still fell from {number(self.start)} to {number(self.end)}"


# Fewer losses than this are a beginning, not a trend.
_FEWEST = 20
# An improvement of less than 1 % of what it could is none (design; AUTOTRAINER's slow
# convergence: accuracy gains < 0.01 per epoch).
_NO_IMPROVEMENT = 0.01
# The first descent of a net that learns nothing but the outputs' bias: some percent, at once.
_PRIOR_ONLY = 0.05
# Loss ≪ start: small gradients and updates are then what success looks like.
_CONVERGED = 0.1


def progress(run: Run) -> Progress:
    """What the loss says."""
    loss = run.scalars["loss"].astype(np.float64)
    broken = run.scalars["loss_nonfinite"] > 0
    known = loss[np.isfinite(loss)]
    start = float(np.median(known[:5])) if known.size else np.nan
    tail = max(5, known.size // 5)
    end = float(np.median(known[-tail:])) if known.size else np.nan
    # A single bad batch is not the end of a training; one that never recovers is.
    last_known = np.flatnonzero(~np.isnan(loss) | broken)
    if last_known.size and broken[last_known[-1]]:
        return Progress(LossVerdict.NONFINITE, start, end)
    if not run.meta.get("loss_is_progress", True):
        return Progress(LossVerdict.PROVES_NOTHING, start, end)
    if known.size < _FEWEST:
        return Progress(LossVerdict.UNKNOWN, start, end)
    return Progress(_trend(known, start, end, tail), start, end)


def _trend(known: NDArray[np.float64], start: float, end: float, tail: int) -> LossVerdict:
    fall = (start - end) / max(abs(start), np.finfo(np.float64).tiny)
    if start > 0 and end >= 0 and end <= _CONVERGED * start:
        return LossVerdict.CONVERGED
    if fall < _NO_IMPROVEMENT:
        return LossVerdict.STUCK
    # Medians of 5 and of `tail` values: their difference has this standard error.
    error = 1.2533 * noise(known) * np.sqrt(1 / 5 + 1 / tail)
    if start - end < 2 * error:
        return LossVerdict.UNKNOWN
    tenth = known.size // 10
    early = float(np.median(known[tenth : tenth + tail]))
    later_fall = (early - end) / max(abs(early), np.finfo(np.float64).tiny)
    if fall < _PRIOR_ONLY and later_fall < _NO_IMPROVEMENT and known.size >= 5 * _FEWEST:
        return LossVerdict.STUCK
    return LossVerdict.LEARNING


# Over all the steps seen a layer that stands still has moved by less than this share of itself …
_STILL = 1e-3
# … and some other by so many times more: a whole model that moves little has a small learning
# rate, or has converged.
_CONTRAST = 1e3


def standing_still(run: Run) -> NDArray[np.bool_]:
    """Per parameter: trainable, in the optimizer, and in effect unmoved while others move."""
    table = run.parameters
    ratio = median(table["update_ratio"], axis=0)
    moved = ratio * len(run.steps)
    held = (table["requires_grad"] == 1).any(axis=0) & (table["in_optimizer"] == 1).any(axis=0)
    weights = np.array([e.group in {"weight", "attention"} for e in table.entities], dtype=bool)
    judged: NDArray[np.bool_] = held & weights & measured(moved)
    if not judged.any():
        return judged
    liveliest = float(moved[judged].max())
    still: NDArray[np.bool_] = judged & (moved < _STILL) & (moved * _CONTRAST < liveliest)
    return still


def severity(progress: Progress, *, still: bool, extreme: bool) -> Severity:
    """The severity of a persistent symptom.

    A loss that is stuck or non-finite: error. Layers that stand still while others move:
    warning. Where the loss is unknown, an extreme symptom: warning. Else it is information.
    """
    if progress.failed:
        return Severity.ERROR
    if progress.verdict is LossVerdict.CONVERGED:
        return Severity.INFO
    if still or (extreme and progress.verdict is LossVerdict.UNKNOWN):
        return Severity.WARNING
    return Severity.INFO
