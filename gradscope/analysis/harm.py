"""Evidence of harm: whether the loss got anywhere, and which layers in effect stand still.

Severity means harm. Symptoms alone, however extreme, are information: on healthy trainings
ungated rules raise an alarm in 36 to 72 % of cases (DeepDiagnosis and DeepLocalize on
AUTOTRAINER's models; docs/decisions/0005).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.chance import of_a_guess
from gradscope.analysis.finding import Severity
from gradscope.analysis.once import once
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
    # What it said of the finite losses, before they broke if they did.
    before: LossVerdict
    # What the best constant prediction costs; NaN: not known.
    guess: float = np.nan

    @property
    def failed(self) -> bool:
        """Whether the loss proves that training does not work.

        One that was learning until a NaN came was not harmed by what was there all along.
        """
        if self.verdict is LossVerdict.NONFINITE:
            return self.before not in {LossVerdict.LEARNING, LossVerdict.CONVERGED}
        return self.verdict is LossVerdict.STUCK

    @property
    def is_a_guess(self) -> bool:
        """Whether the loss ends no lower than that of a constant prediction."""
        return bool(self.end > _GUESSES * self.guess)

    @property
    def words(self) -> str:
        """The verdict as a clause of a sentence."""
        if self.verdict is LossVerdict.STUCK:
            guess = f"; a guess costs {number(self.guess)}" if self.is_a_guess else ""
            return (
                f"the loss is stuck ({number(self.start)} at first, {number(self.end)} at last"
                f"{guess})"
            )
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
# … unless it stands out of the noise: a loss may have a large constant part.
_CLEAR = 5.0
# The first descent of a net that learns nothing but the outputs' bias: some percent, at once.
_PRIOR_ONLY = 0.05
# Loss ≪ start: small gradients and updates are then what success looks like.
_CONVERGED = 0.1
# A loss that rests this close to a guess's, or above it, has learned nothing wherever it began.
_GUESSES = 0.97
# Where the noise hides a fall of this share, nothing can be said.
_TOO_NOISY = 0.1


@once
def progress(run: Run) -> Progress:
    """What the loss says."""
    loss = run.scalars["loss"].astype(np.float64)
    broken = run.scalars["loss_nonfinite"] > 0
    curve = _Curve(loss[np.isfinite(loss)])
    trend, guess = LossVerdict.UNKNOWN, of_a_guess(run)
    if not run.meta.get("loss_is_progress", True):
        trend = LossVerdict.PROVES_NOTHING
    elif curve.values.size >= _FEWEST:
        trend = curve.trend(guess, warming_up=is_warming_up(run.scalars["learning_rate"]))
    # A single bad batch is not the end of a training; one that never recovers is.
    known = np.flatnonzero(~np.isnan(loss) | broken)
    if known.size and broken[known[-1]]:
        return Progress(LossVerdict.NONFINITE, curve.start, curve.end, trend, guess)
    return Progress(trend, curve.start, curve.end, trend, guess)


def stuck_before(run: Run, step: int) -> bool:
    """Whether the loss had been stuck already when something began at this step.

    Then it is not what made it stick: on labels that say nothing, units die, too.
    """
    earlier = run.steps < step
    loss = run.scalars["loss"][earlier].astype(np.float64)
    known = loss[np.isfinite(loss)]
    if known.size < _FEWEST:
        return False
    warming_up = is_warming_up(run.scalars["learning_rate"][earlier])
    return _Curve(known).trend(of_a_guess(run), warming_up=warming_up) is LossVerdict.STUCK


def _start(values: NDArray[np.float64], head: int) -> float:
    """The level at first: of the first few losses, or the first if it is clearly lower.

    A training may blow up within its first few steps; but the first of noisy losses may be low
    by chance.
    """
    level, first = float(np.median(values[:head])), float(values[0])
    return first if first < level - _CLEAR * noise(values[values.size // 2 :]) else level


class _Curve:
    """The finite losses: where they start and end, and how sure that is."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values
        self._head, self._tail = max(5, values.size // 10), max(5, values.size // 5)
        self._noise = noise(values)
        self.start = _start(values, self._head) if values.size else np.nan
        self.end = float(np.median(values[-self._tail :])) if values.size else np.nan

    def trend(self, guess: float, *, warming_up: bool) -> LossVerdict:
        """What it says; `guess` is the loss of a constant prediction, NaN where not known."""
        found = self._course(warming_up=warming_up)
        settled = self.values.size >= 5 * _FEWEST and not warming_up
        if found is not LossVerdict.STUCK and settled and self.end > _GUESSES * guess:
            half = self.values.size // 2
            later = float(np.median(self.values[half : half + self._tail])) - self.end
            return found if self._is_improvement(later, abs(self.start)) else LossVerdict.STUCK
        return found

    def _course(self, *, warming_up: bool) -> LossVerdict:
        scale = max(abs(self.start), float(np.finfo(np.float64).tiny))
        if not self.values.any() or 0 <= self.end <= _CONVERGED * self.start:
            return LossVerdict.CONVERGED
        fall = self.start - self.end
        tenth = self.values.size // 10
        later = float(np.median(self.values[tenth : tenth + self._tail])) - self.end
        if self._is_improvement(fall, scale):
            at_once = fall < _PRIOR_ONLY * scale and not self._is_improvement(later, scale)
            if at_once and self.values.size >= 5 * _FEWEST and not warming_up:
                return LossVerdict.STUCK
            return LossVerdict.LEARNING
        # The noise hides a fall only as far as it reaches: a loss far above its start has not
        # fallen, however noisy.
        possible = fall + 2 * self._error >= _NO_IMPROVEMENT * scale
        noisy = possible and 2 * self._error > _TOO_NOISY * scale
        hidden = fall >= _NO_IMPROVEMENT * scale or noisy
        return LossVerdict.UNKNOWN if warming_up or hidden else LossVerdict.STUCK

    @property
    def _error(self) -> float:
        """The standard error of the difference of two medians (of normal values: ×1.2533)."""
        return 1.2533 * self._noise * float(np.sqrt(1 / self._head + 1 / self._tail))

    def _is_improvement(self, fall: float, scale: float) -> bool:
        large = fall >= _NO_IMPROVEMENT * scale or 0 < _CLEAR * self._noise <= fall
        return large and fall > 2 * self._error


def is_warming_up(rates: NDArray[Any]) -> bool:
    """Whether the learning rate has risen from less than half, and still rises at the end."""
    known = rates[~np.isnan(rates)]
    if known.size < 2:  # noqa: PLR2004  (no direction)
        return False
    recent = known[-max(2, known.size // 10)]
    return bool(known[-1] > recent and known[-1] == known.max() and known[0] < known[-1] / 2)


# Over all the steps seen a layer that stands still has moved by less than this share of itself …
_STILL = 1e-3
# … and some other by so many times more: a whole model that moves little has a small learning
# rate, or has converged.
_CONTRAST = 1e3
# A weight that starts this far below the others' typical size was started at zero.
_NEWBORN = 1e-2


def standing_still(run: Run) -> NDArray[np.bool_]:
    """Per parameter: trainable, in the optimizer, and in effect unmoved while others move."""
    table = run.parameters
    ratio = median(table["update_ratio"], axis=0)
    moved = ratio * len(run.steps)
    held = (table["requires_grad"] == 1).any(axis=0) & (table["in_optimizer"] == 1).any(axis=0)
    weights = np.array([e.group in {"weight", "attention"} for e in table.entities], dtype=bool)
    judged: NDArray[np.bool_] = held & weights & measured(moved)
    # What starts at zero moves far in proportion to itself, and sets no standard.
    scale = table["weight_rms"][:1].astype(np.float64)
    if scale.size and judged.any():
        judged &= np.nan_to_num(scale[0]) >= _NEWBORN * median(scale[0][judged], axis=0)
    if not judged.any():
        return judged
    liveliest = float(moved[judged].max())
    still: NDArray[np.bool_] = judged & (moved < _STILL) & (moved * _CONTRAST < liveliest)
    return still


def severity(progress: Progress, *, still: bool, extreme: bool) -> Severity:
    """The severity of a persistent symptom.

    A loss that is stuck or non-finite: error. Layers that stand still while others move:
    warning. An extreme symptom: warning, unless the loss has converged; it may have fallen by
    what the output layer alone can learn. Else it is information.
    """
    if progress.failed:
        return Severity.ERROR
    if LossVerdict.CONVERGED in {progress.verdict, progress.before}:
        return Severity.INFO
    may_hide_it = progress.verdict in {LossVerdict.UNKNOWN, LossVerdict.LEARNING}
    if still or (extreme and may_hide_it):
        return Severity.WARNING
    return Severity.INFO
