"""GS206 loss-oscillating."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.losses import at_most, losses
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import signal
from gradscope.analysis.words import number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a loss counts as oscillating."""

    # The correlation of neighbours about the trend. Batch noise has 0, give or take 1/√n; a loss
    # that jumps between two walls of a valley has -1.
    alternation: float = -0.5
    # The median deviation from the trend, over the level: less is lost in the noise of ordinary
    # batches. The median, as single spikes of Adam are no oscillation.
    amplitude: float = 0.1
    # Half of as many losses are judged: enough to tell -0.5 from 0 by three standard errors.
    min_losses: int = 80


# Moving means of so many: what is slower is trend. Even, so that an alternation averages out.
_WINDOW = 20
_SEVERAL = 2
# An improvement of less than 1 % is none (as in harm.py).
_AS_LOW = 0.99
# At rest, or another rule's.
_ELSEWHERE = frozenset({LossVerdict.CONVERGED, LossVerdict.NONFINITE})


@rule("GS206", name="loss-oscillating", limits=Limits())
def loss_oscillating(run: Run, limits: Limits) -> Iterator[Finding]:
    """The loss jumps up and down, by the steps themselves and not by the choice of batches.

    ## What it measures
    In the second half of the run the losses about their moving mean, if they vary by a tenth of
    the loss or more: whether each rise is followed by a fall (a correlation of neighbours below
    -0.5). Where every step has the same batch, and no dropout, any such variation counts.

    ## Why it matters
    A step that is longer than the valley is wide ends on its other side. Along that direction
    nothing is learned, and the loss can't fall below where the walls are.

    ## How sure it is
    Likely: alternation of the loss is measured, and that a smaller learning rate ends it
    follows from theory.

    ## Known limits
    Gradient descent on whole batches lives at this edge and learns (Cohen et al. 2021): as long as
    the loss gets lower than it was in the first half it is information. Jumps that are no
    alternation can't be told from the noise of batches; two batches in turn alternate, too.
    Not judged while the learning rate goes up and down.

    ## Example
    SGD at 1.9 times the inverse of the largest curvature: the error changes its sign in every
    step, and shrinks by a tenth. Do instead: half of that rate.

    ## References
    Cohen et al. 2021 (arXiv:2103.00065), the edge of stability; LeCun et al. 1998, "Efficient
    BackProp", section 6; Zhang et al. 2021 (AUTOTRAINER, ICSE), oscillating loss.
    """
    curve = losses(run, limits.min_losses)
    later = curve.values.size // 2
    about, level = _about_trend(curve.values[later:])
    size = float(np.median(np.abs(about)))
    if level <= 0 or size < limits.amplitude * level:
        return
    if _rises(run, int(curve.steps[later])):
        message = "the learning rate goes up and down, and the loss with it"
        raise UnjudgedError(message)
    neighbours = float(np.mean(about[1:] * about[:-1]) / np.mean(about**2))
    alternates = neighbours <= limits.alternation
    if not alternates and not _has_one_batch(run, int(curve.steps[later])):
        return
    loss = progress(run)
    best = float(_moving_mean(curve.values[:later]).min())
    no_gain = level > _AS_LOW * best and loss.verdict not in _ELSEWHERE
    first, last = int(curve.steps[later]), int(curve.steps[-1])
    how = (
        "each rise is followed by a fall" if alternates else "though every step has the same batch"
    )
    gained = "no lower than" if no_gain else "beside"
    yield loss_oscillating.finding(
        at_most(run, Severity.WARNING if no_gain else Severity.INFO),
        None,
        f"The loss swings by {share(size / level)} of its level, {how}; it is {number(level)} in "
        f"the second half, {gained} the {number(best)} that it reached in the first.",
        evidence=(
            Evidence(
                "loss, median deviation from its trend / level",
                None,
                first,
                last,
                size / level,
                limits.amplitude,
            ),
            Evidence(
                "loss, correlation of neighbours", None, first, last, neighbours, limits.alternation
            ),
        ),
        remedies=_remedies(run, first),
    )


def _moving_mean(values: F64) -> F64:
    """Centred means of `_WINDOW` intervals: half weight at both ends."""
    weights = np.ones(_WINDOW + 1)
    weights[[0, -1]] = 0.5
    means: F64 = np.convolve(values, weights / _WINDOW, mode="valid")
    return means


def _about_trend(values: F64) -> tuple[F64, float]:
    """The values less their moving mean, and their mean."""
    about: F64 = values[_WINDOW // 2 : -(_WINDOW // 2)] - _moving_mean(values)
    return about, float(values.mean())


def _rises(run: Run, since: int) -> bool:
    """Whether the learning rate rises more than once in this part: the loss then follows it."""
    rates = run.scalars["learning_rate"][run.steps >= since].astype(np.float64)
    changes = np.diff(rates[np.isfinite(rates)])
    changes = changes[changes != 0]
    begins = (changes > 0) & np.append(True, changes[:-1] < 0)
    return int(begins.sum()) >= _SEVERAL


def _has_one_batch(run: Run, since: int) -> bool:
    """Whether the input is known to have been the same at each step of this part, undisturbed."""
    given = signal(run, "input")
    if given is None or run.meta.get("dropout"):
        return False
    repeated = given["repeated"][given.steps >= since]
    known = repeated[measured(repeated)]
    return bool(known.size and (known == 1).all())


def _remedies(run: Run, since: int) -> tuple[str, ...]:
    rates = run.scalars["learning_rate"][run.steps >= since]
    rates = rates[np.isfinite(rates)]
    to = f": {number(float(rates[-1]))} → {number(float(rates[-1]) / 2)}" if rates.size else ""
    return (
        f"Halve the learning rate{to}, or let it decay "
        "(torch.optim.lr_scheduler.CosineAnnealingLR).",
        "Less momentum damps the swings; so does a norm, by a smaller curvature.",
    )
