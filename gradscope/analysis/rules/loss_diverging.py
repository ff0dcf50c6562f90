"""GS202 loss-diverging."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, is_warming_up, progress
from gradscope.analysis.losses import Losses, at_most, losses
from gradscope.analysis.robust import noise, since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a loss counts as diverging."""

    # The level at last over the level at first (error), or over the lowest in between (warning).
    # Lightning's SpikeDetection and TheDeepChecker begin at 3 and at 2⁴; the catapult, which
    # heals, doubles it.
    rise: float = 3.0
    # Of what had been gained over the start, so much is lost again. A learning rate that is
    # raised, a term that is switched on, cost less.
    lost: float = 0.5
    # A loss on its way back down is at last below this share of its highest level: half, as it
    # jumps about where it is high.
    recovery: float = 0.5
    # Fewer losses are a beginning, not a trend (as in harm.py).
    min_losses: int = 20


# Standard errors (of a median: ×1.2533) by which a rise stands out of the noise, as in harm.py.
_CLEAR = 5.0


@rule("GS202", name="loss-diverging", limits=Limits())
def loss_diverging(run: Run, limits: Limits) -> Iterator[Finding]:
    """The loss rises far above where it was, and stays there.

    ## What it measures
    The median of the last fifth of the losses over that of the first tenth: threefold or more,
    and not on its way back down. Or over the lowest level in between, where half of what had
    been gained is lost again.

    ## Why it matters
    An untrained model guesses. A loss above that is made by training: each step does harm,
    through a learning rate that is too large, or a gradient of the wrong sign.

    ## How sure it is
    Certain that the loss rose, by far more than its noise. The cause is likely one of the
    others named, if there are any.

    ## Known limits
    A loss that ends as NaN is GS501. Not judged: what was said to be no measure of progress,
    losses of both signs, a learning rate that still rises. With several optimizers, which may
    work against each other, it is information.

    ## Example
    Gradient descent at 2.1 times the inverse of the largest curvature: the error grows by 10 %
    in each step. Do instead: half of the rate, or less.

    ## References
    Goodfellow, Bengio & Courville 2016, section 8.2.4; Braiek & Khomh 2023 (TheDeepChecker,
    TOSEM), on diverging loss; Wortsman et al. 2023 (arXiv:2309.14322), on slow divergence.
    """
    curve = losses(run, limits.min_losses)
    values = curve.values
    smooth = curve.smooth
    loss = progress(run)
    tail = max(5, values.size // 5)
    start, end = curve.start, float(np.median(values[-tail:]))
    if loss.verdict is LossVerdict.NONFINITE or start <= 0 or end <= 0:
        return
    if is_warming_up(run.scalars["learning_rate"]):
        message = "the learning rate still rises"
        raise UnjudgedError(message)
    # As long a stretch as that at last: of shorter ones some are low by chance.
    levels = np.median(np.lib.stride_tricks.sliding_window_view(values, tail), axis=1)
    best = int(np.argmin(smooth))
    lowest = min(start, float(levels.min()))
    if smooth[-1] < limits.recovery * smooth[best:].max():
        return
    from_start = end >= limits.rise * start
    # A tenth of a long run is far down already.
    highest = max(start, float(smooth[0]))
    error = 1.2533 * noise(values) * float(np.sqrt(2 / tail))
    lost = end - lowest >= max(limits.lost * highest, _CLEAR * error)
    thrown_back = lost and end >= limits.rise * lowest
    if not from_start and not thrown_back:
        return
    reference = start if from_start else lowest
    onset = _onset(curve, reference * (1 + (limits.rise - 1) / 2))
    last = int(curve.steps[-1])
    from_words = "at first" if from_start else "at its lowest"
    yield loss_diverging.finding(
        at_most(run, Severity.ERROR if from_start else Severity.WARNING),
        None,
        f"The loss rose from {number(reference)} {from_words} to {number(end)} at last; it has "
        f"been rising, or high, since step {onset}.",
        evidence=(
            Evidence("loss, at last / before", None, onset, last, end / reference, limits.rise),
        ),
        remedies=(
            "Divide the learning rate by 10; then raise it again as long as the loss falls.",
            "Check the sign: the loss is minimized; what is to be maximized needs a minus "
            "(or maximize=True in the optimizer), and nothing should negate the gradients.",
            "Clip with scope.clip_grad_norm_(1.0), and ramp the learning rate up "
            "(torch.optim.lr_scheduler.LinearLR).",
        ),
    )


def _onset(curve: Losses, level: float) -> int:
    """The step since which the smoothed loss has been above the level."""
    smooth = curve.smooth
    at = min(since(smooth > level), smooth.size - 1)
    return int(curve.steps[at])
