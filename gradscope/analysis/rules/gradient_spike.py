"""GS201 gradient-spike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.losses import Losses, at_most, losses
from gradscope.analysis.norms import global_norms
from gradscope.analysis.robust import F64, Bools, measured, median, noise
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, listed, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as a spike, and when it did harm."""

    # Robust z over the norms before it: OLMo-core skips steps beyond 6σ over 128 steps.
    z: float = 6.0
    window: int = 128
    # OLMo-core's least number of norms to compare with.
    min_norms: int = 64
    # A floor on σ, over the median: on smooth runs 6σ alone fired 28 times in 1000 healthy steps.
    min_spread: float = 0.1
    # SPAM's gradient spike score (2501.06842): no reaction of the loss is then needed.
    extreme: float = 50.0
    # More of them than this are the tail of an ordinary distribution, not events: OLMo 2 calls a
    # run with a spike score of 0.4 % unstable, batches of one exceed 1 %.
    max_share: float = 0.01
    # A norm that stays at half of the spike is a change of level, not a spike.
    level: float = 0.5
    # PaLM rewound some 100 steps: what has not healed by then does not heal by itself.
    recovery: int = 100
    # What the loss must have lost for good, over its start: 5 % is less than what the last
    # epochs bring.
    min_shift: float = 0.05
    # As in harm.py: below a tenth of its start the loss has converged.
    solved: float = 0.1


# Losses before and after that are compared.
_BEFORE, _AFTER = 20, 5
_LEAST_AFTER = 20
# Standard errors by which a shift of the loss stands out.
_CLEAR = 3.0
# A learning rate that was raised by so much explains what comes.
_RAISED = 1.5
_MAD = 1.4826


@rule("GS201", name="gradient-spike", limits=Limits())
def gradient_spike(run: Run, limits: Limits) -> Iterator[Finding]:
    """A single gradient is many times larger than those before it.

    ## What it measures
    The global norm of each gradient (before clipping where that is known) against the median and
    the MAD of the up to 128 before it: six deviations, none of them smaller than a tenth of the
    median, if the loss rises after it; or fifty times the median.

    ## Why it matters
    One step along such a gradient can undo thousands: the weights are thrown where the loss is
    higher, units die, Adam's averages are off for as long as they remember. The usual cause is a
    batch unlike the others: a broken sample, an outlier, a repeated sequence.

    ## How sure it is
    Certain that the norm stood out. Why it did is possible only: the batch, the learning rate
    and chance look alike.

    ## Known limits
    A spike that the loss recovers from within 100 steps is information. Of steps that were not
    recorded the norm is known only if it is logged (`scope.clip_grad_norm_`,
    `log(grad_norm=...)`). Where more than one norm in a hundred stands out, as with batches of
    one, none is called a spike.

    ## Example
    One batch of inputs that nobody divided by 255: a gradient of 600 where 1 is usual, and a loss
    that is twice as high from then on. Do instead: `scope.clip_grad_norm_(1.0)`, and a check of
    what the loader yields.

    ## References
    Chowdhery et al. 2022 (PaLM), section 5.1; OLMo 2 (arXiv:2501.00656), section 3; Huang et al.
    2025 (SPAM, ICLR); Pascanu, Mikolov & Bengio 2013 (ICML), section 3.2.
    """
    steps, norms, name = global_norms(run, limits.min_norms + 1)
    z, ratios = _scores(norms, limits)
    loud = (z >= limits.z) | (ratios >= limits.extreme)
    if not loud.any() or _events(loud).sum() > max(limits.max_share * norms.size, 1.5):
        return
    curve = _known_losses(run)
    found = [
        int(at)
        for at in np.flatnonzero(loud)
        if not _is_new_level(norms, int(at), limits)
        and not _was_raised(run, int(steps[at]))
        and (ratios[at] >= limits.extreme or _reacts(curve, int(steps[at])))
    ]
    if not found:
        return
    shifts = {at: _shift(run, curve, int(steps[at]), limits) for at in found}
    worst = max(found, key=lambda at: (shifts[at] or 0.0, ratios[at]))
    step, shift = int(steps[worst]), shifts[worst]
    amount = int(_events(np.isin(np.arange(loud.size), found)).sum())
    others = f" ({count(amount, 'spike')} in all)" if amount > 1 else ""
    loudest = _loudest(run, step)
    where = f", most of all in {listed(loudest)}" if loudest else ""
    yield gradient_spike.finding(
        at_most(run, Severity.WARNING if shift else Severity.INFO),
        None,
        f"At step {step} the gradient's norm was {number(norms[worst])}, {number(ratios[worst])} "
        f"times that of the steps before it{where}{others}; {_aftermath(curve, step, shift)}.",
        evidence=(
            Evidence(
                f"{name} / median before", None, step, step, float(ratios[worst]), limits.extreme
            ),
            Evidence(f"{name}, robust z", None, step, step, float(z[worst]), limits.z),
        ),
        remedies=(
            f"Look at the batch of step {step}: an outlier, inputs that were not scaled, a broken "
            "target.",
            f"Clip: scope.clip_grad_norm_({number(_typical(norms, worst, limits))}), the usual "
            "norm, leaves the other steps nearly as they are.",
            "Skip steps whose norm is far beyond the usual; go back to a checkpoint before this "
            "one and leave the batch out.",
        ),
    )


def _events(loud: Bools) -> Bools:
    """Where one begins: the steps after a spike may be loud on their way back."""
    earlier = np.zeros_like(loud)
    for lag in range(1, _AFTER + 1):
        earlier[lag:] |= loud[:-lag]
    begins: Bools = loud & ~earlier
    return begins


def _scores(norms: F64, limits: Limits) -> tuple[F64, F64]:
    """Per norm: its robust z, and its ratio to the median, of the norms before it; 0 at first."""
    usual, spread = np.full(norms.size, np.inf), np.full(norms.size, np.inf)
    full = limits.window
    for at in range(limits.min_norms, min(full, norms.size)):
        usual[[at]], spread[[at]] = _level(norms[None, :at])
    if norms.size > full:
        windows = np.lib.stride_tricks.sliding_window_view(norms[:-1], full)
        usual[full:], spread[full:] = _level(windows)
    known = np.isfinite(usual)
    above = np.where(known, norms - np.where(known, usual, 0.0), 0.0)
    z: F64 = above / np.maximum(spread, limits.min_spread * usual)
    return z, norms / usual


def _level(windows: F64) -> tuple[F64, F64]:
    """Per row: the median, and the MAD as a standard deviation."""
    usual: F64 = np.median(windows, axis=1)
    return usual, _MAD * np.median(np.abs(windows - usual[:, None]), axis=1)


def _typical(norms: F64, at: int, limits: Limits) -> float:
    return float(np.median(norms[max(0, at - limits.window) : at]))


def _is_new_level(norms: F64, at: int, limits: Limits) -> bool:
    """Whether the norms behind it are as large."""
    behind = norms[at + 1 : at + 1 + _AFTER]
    return bool(behind.size and np.median(behind) >= limits.level * norms[at])


def _was_raised(run: Run, step: int) -> bool:
    """Whether the learning rate was raised shortly before: a warm restart."""
    near = (run.steps >= step - _BEFORE) & (run.steps <= step)
    rates = run.scalars["learning_rate"][near].astype(np.float64)
    rates = rates[np.isfinite(rates)]
    return bool(rates.size and rates[-1] > _RAISED * rates.min())


def _known_losses(run: Run) -> Losses | None:
    try:
        return losses(run, _BEFORE + _AFTER)
    except UnjudgedError:
        return None


def _around(curve: Losses, step: int) -> tuple[F64, F64]:
    """The losses before the step's update, and after it; that of the batch itself is in neither."""
    return curve.values[curve.steps < step][-_BEFORE:], curve.values[curve.steps > step]


def _rise(before: F64, after: F64) -> tuple[float, float]:
    """How far the median rose, and its standard error (of a median: ×1.2533)."""
    usual = float(np.median(before))
    # Neighbours may be more alike than losses further apart.
    spread = max(noise(before), _MAD * float(np.median(np.abs(before - usual))))
    error = 1.2533 * spread * float(np.sqrt(1 / before.size + 1 / after.size))
    return float(np.median(after)) - usual, error


def _reacts(curve: Losses | None, step: int) -> bool:
    """Whether the loss is higher just after it."""
    if curve is None:
        return False
    before, after = _around(curve, step)
    if before.size < _BEFORE or after.size < _AFTER:
        return False
    rise, error = _rise(before, after[:_AFTER])
    return rise > _CLEAR * error and rise > 0


def _shift(run: Run, curve: Losses | None, step: int, limits: Limits) -> float | None:
    """How much higher the loss stayed after it; None where it recovered, or that is not known."""
    loss = progress(run)
    if curve is None or loss.verdict is LossVerdict.CONVERGED:
        return None
    before, after = _around(curve, step)
    after = after[: limits.recovery]
    if before.size < _BEFORE or after.size < _LEAST_AFTER or not _reacts(curve, step):
        return None
    # The lowest that it came to, by medians as long as that before.
    windows = np.lib.stride_tricks.sliding_window_view(after, _LEAST_AFTER)
    lowest = windows[int(np.argmin(np.median(windows, axis=1)))]
    rise, error = _rise(before, lowest)
    # Of batches of one the losses scatter after it as they may have before.
    error = max(error, _rise(lowest, before)[1])
    lasting = rise > _CLEAR * error and rise >= limits.min_shift * loss.start
    # What is next to nothing still is.
    lasting &= float(np.median(lowest)) > limits.solved * loss.start
    return rise if lasting else None


def _aftermath(curve: Losses | None, step: int, shift: float | None) -> str:
    if curve is None:
        return "what the loss did is not known"
    before, after = _around(curve, step)
    if shift:
        return (
            f"the loss was {number(float(np.median(before)))} before and has stayed "
            f"{number(shift)} above it"
        )
    if after.size < _LEAST_AFTER:
        return "the run ends too soon after it to see what it did"
    return "the loss recovered"


def _loudest(run: Run, step: int) -> list[str]:
    """The parameters whose gradient grew most in this step, if it was recorded."""
    table = run.parameters
    at = int(np.searchsorted(table.steps, step))
    if at == 0 or at >= len(table.steps) or table.steps[at] != step:
        return []
    usual = median(table["grad_norm"][max(0, at - _BEFORE) : at], axis=0)
    growth = np.full(usual.size, np.nan)
    known: Bools = measured(usual) & (usual > 0)
    growth[known] = table["grad_norm"][at, known] / usual[known]
    order = np.argsort(-np.nan_to_num(growth, nan=-1.0), kind="stable")
    return [table.names[index] for index in order if measured(growth[[index]])[0]]
