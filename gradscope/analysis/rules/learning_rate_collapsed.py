"""GS208 learning-rate-collapsed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress, stuck_before
from gradscope.analysis.robust import F64, Bools, measured, noise, since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import count, number, share
from gradscope.record import Run, StepArray


@dataclass(frozen=True, slots=True)
class Limits:
    """When a learning rate counts as collapsed."""

    # Of its peak: schedules end at a tenth to a hundredth (Hoffmann et al. 2022), or at zero with
    # 2 % of the steps below this (cosine).
    fall: float = 1e-3
    # Most of what was seen. A schedule that ends at zero spends its end there, not its middle.
    min_share_of_steps: float = 0.5
    # The steps have to shrink too: a scheduler may rest the first parameter group alone.
    slowed: float = 1e-2
    # The least improvement that counts as one (design), of the first loss.
    improvement: float = 0.01
    # A training that has just begun has not moved yet (GS402): a rate within a tenth of its highest
    # for fewer steps has not been tried, and a stuck loss is its work.
    beginning: int = 100
    # Fewer losses than this are a beginning, not a trend (as in analysis/harm.py).
    min_steps: int = 20


@dataclass(frozen=True, eq=False, slots=True)
class _Schedule:
    """The learning rates that are known, and from which of them on they are next to nothing."""

    steps: StepArray
    rates: F64
    onset: int

    @property
    def begin(self) -> int:
        """The step from which on."""
        return int(self.steps[self.onset])

    @property
    def high(self) -> Bools:
        """Where the rate is within a tenth of its highest, and above zero."""
        high: Bools = (self.rates > 0) & (self.rates >= self.rates.max() / 10)
        return high

    @property
    def spent(self) -> float:
        """The share of the steps at next to nothing."""
        return 1 - self.onset / len(self.steps)


@rule("GS208", name="learning-rate-collapsed", limits=Limits())
def learning_rate_collapsed(run: Run, limits: Limits) -> Iterator[Finding]:
    """The learning rate has fallen to next to nothing long before the training ends.

    ## What it measures
    The learning rate of each step against the highest before it: from which step on it is below a
    thousandth, to the end, and what share of the steps seen that is; more than half counts, or a
    rate of zero in all. Then whether the steps shrank with it, whether the loss was still falling
    while the rate was high, and whether it stands still since.

    ## Why it matters
    What the learning rate takes, no number of steps brings back: a thousand steps at a thousandth
    are one. The usual causes are a scheduler that counts epochs and is called at every batch, one
    that is called twice, and one built for a shorter training.

    ## How sure it is
    Certain as to the learning rate. That it stopped the training is likely, where the loss was
    still falling when it went.

    ## Known limits
    The rate is that of the first optimizer's first parameter group. A warm-up, a cosine to zero,
    restarts, and a rate that is lowered once the loss rests, are in order; a loss that has
    converged, or was stuck before, is information. A fall of less than a thousandfold is not
    judged.

    ## Example
    `StepLR(optimizer, step_size=30)` with `scheduler.step()` after every batch: after 90 batches
    the rate is a thousandth. Do instead: `scheduler.step()` once per epoch, or `step_size` in
    batches.

    ## References
    PyTorch's documentation, "How to adjust learning rate"; Hoffmann et al. 2022
    (arXiv:2203.15556), section B, on a cosine that is shorter or longer than the training;
    Loshchilov & Hutter 2017 (arXiv:1608.03983), on restarts.
    """
    schedule = _schedule(run, limits)
    if schedule is None or not _slowed(run, schedule, limits):
        return
    loss = progress(run)
    peak, last = float(schedule.rates.max()), float(schedule.rates[-1])
    if peak == 0:
        message = f"The learning rate is 0 in all of {count(len(schedule.steps), 'step')}"
    else:
        message = (
            f"The learning rate fell from {number(peak)} to {number(last)}: it is below a "
            f"{number(1 / limits.fall)}th of its highest since step {schedule.begin}, in "
            f"{share(schedule.spent)} of the steps seen"
        )
    yield learning_rate_collapsed.finding(
        _severity(run, loss, schedule, limits),
        None,
        f"{message}; {loss.words}.",
        evidence=(
            Evidence(
                "learning_rate",
                None,
                schedule.begin,
                int(schedule.steps[-1]),
                last,
                peak * limits.fall,
            ),
        ),
        remedies=_remedies(peak),
    )


def _schedule(run: Run, limits: Limits) -> _Schedule | None:
    """The schedule, if it has collapsed; raises UnjudgedError where too little of it is known."""
    rates = run.scalars["learning_rate"].astype(np.float64)
    known = np.isfinite(rates)
    if known.sum() < limits.min_steps:
        found = count(int(known.sum()), "step")
        message = f"the learning rate is known of {found}, {limits.min_steps} are needed"
        raise UnjudgedError(message)
    rates = rates[known]
    # Ten times a tenth is a hundredth but for rounding.
    low = rates <= limits.fall * rates.max() * (1 + 1e-6)
    schedule = _Schedule(run.steps[known], rates, since(low))
    return schedule if low[-1] and schedule.spent > limits.min_share_of_steps else None


def _slowed(run: Run, schedule: _Schedule, limits: Limits) -> bool:
    """Whether the weights move by as much less, as far as that was measured."""
    moved = run.parameters["update_norm"][:, held_weights(run)].astype(np.float64)
    later = run.recorded_steps >= schedule.begin
    after, before = moved[later], moved[~later]
    after, before = after[measured(after)], before[measured(before)]
    if not after.size:
        return True
    if not before.size:
        return schedule.onset > 0 or not after.any()
    return bool(np.median(after) <= limits.slowed * np.median(before))


def _severity(run: Run, loss: Progress, schedule: _Schedule, limits: Limits) -> Severity:
    if loss.verdict in {LossVerdict.CONVERGED, LossVerdict.PROVES_NOTHING}:
        return Severity.INFO
    if int(schedule.high.sum()) < limits.beginning and loss.failed:
        return Severity.ERROR
    if not schedule.high.any():
        # A rate of zero all along, and nothing that fails for it.
        return Severity.INFO
    if stuck_before(run, schedule.begin) or not _was_falling(run, loss, schedule, limits):
        return Severity.INFO
    if loss.failed:
        return Severity.ERROR
    return Severity.WARNING if _rests(run, loss, schedule, limits) else Severity.INFO


def _was_falling(run: Run, loss: Progress, schedule: _Schedule, limits: Limits) -> bool:
    """Whether the loss still fell when the rate was last within a tenth of its highest."""
    until = int(schedule.steps[np.flatnonzero(schedule.high)[-1]])
    values = _losses(run, run.steps <= until)
    if values.size < limits.min_steps:
        # That is no time for a loss to come to rest in.
        return True
    return _falls(values[values.size // 2 :], loss, limits)


def _rests(run: Run, loss: Progress, schedule: _Schedule, limits: Limits) -> bool:
    values = _losses(run, run.steps >= schedule.begin)
    return values.size >= limits.min_steps and not _falls(values, loss, limits)


def _losses(run: Run, which: Bools) -> F64:
    values = run.scalars["loss"][which].astype(np.float64)
    return values[np.isfinite(values)]


def _falls(values: F64, loss: Progress, limits: Limits) -> bool:
    """Whether the second half is lower than the first, by more than the noise."""
    half = values.size // 2
    fall = float(np.median(values[:half]) - np.median(values[half:]))
    # Of the difference of two medians of normal values.
    error = 1.2533 * noise(values) * float(np.sqrt(2 / half))
    return fall > max(2 * error, limits.improvement * abs(loss.start))


def _remedies(peak: float) -> tuple[str, ...]:
    if peak == 0:
        return (
            "Set a learning rate above zero: 0.1 for SGD and 1e-3 for Adam are where searches "
            "begin.",
            "If a scheduler is to raise it from zero, call scheduler.step() after every "
            "optimizer.step().",
        )
    return (
        "Call scheduler.step() as often as its numbers count: once per epoch if step_size, "
        "milestones or T_max are epochs; and in one place only.",
        "Give the scheduler the whole length of the training (total_steps, T_max), and a lowest "
        "rate (eta_min) of a tenth to a hundredth of the highest.",
    )
