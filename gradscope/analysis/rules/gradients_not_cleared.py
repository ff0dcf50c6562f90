"""GS006 gradients-not-cleared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.balance import Balance, balance
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.robust import Bools, measured, median
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, number, share
from gradscope.record import Run

# So many times the tolerance the gradient before must be, for its part in the sum to be seen.
_BESIDE = 4.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as the sum of the one before and its own."""

    # Two vectors that have nothing to do with each other do not add up to within this by chance;
    # gradients in bfloat16 do to within 1 %.
    tolerance: float = 0.05
    # Of what arrives less than this, relative to the gradient, rounding leaves too little to
    # compare: after a hundred steps that all added up.
    smallest: float = 1e-2
    # A zero_grad() every second step, or once in an epoch, is a fault as well.
    min_share: float = 0.5
    # A coincidence does not come three steps in a row.
    min_steps: int = 3


@rule(
    "GS006",
    name="gradients-not-cleared",
    requires=("parameters.grad_balance", "parameters.grad_previous_cosine"),
    limits=Limits(),
)
def gradients_not_cleared(run: Run, limits: Limits) -> Iterator[Finding]:
    """The optimizer is given the gradients of all steps so far, added up.

    ## What it measures
    Of each bias the gradient of a step, that of the step before, and the sum of what arrived at
    its layer's output in the step: whether the first is the sum of the other two, but for one
    factor at most, as clipping leaves. Their lengths and angles tell. In a sound step the gradient
    is what arrived, and nothing else.

    ## Why it matters
    `backward()` adds to `.grad`. Where nothing clears it, each step goes along the sum of all
    gradients since the first: the length grows with the number of steps, and what the first
    batches said is never forgotten. The loss falls at first, then swings.

    ## How sure it is
    Nearly certain: a gradient that is the sum of the last one and of what arrived has no other
    common cause, and the equation is checked over thousands of numbers.

    ## Known limits
    Needs layers with biases, and two steps in a row that were recorded; without them it is not
    judged: alone a gradient that grows, or that resembles the one before, proves nothing.
    Accumulation over micro-batches is in order: what arrived is summed over all of them. Momentum
    that is written into `.grad` by hand is no sum of these two, unless it keeps 95 % or more.

    ## Example
    `loss.backward(); optimizer.step()` in a loop, without `optimizer.zero_grad()`. Do instead:
    `optimizer.zero_grad()` in front of every `backward()`, or every k-th if k batches are to be
    accumulated.

    ## References
    PyTorch's documentation of `Optimizer.zero_grad`; StackOverflow 60335387, one of the silent
    errors studied in TrainCheck (OSDI'25).
    """
    parts = balance(run)
    fits, judged = _adds_up(parts, limits)
    steps = parts.steps[1:][judged.any(axis=1)]
    if len(steps) < limits.min_steps:
        found = count(len(steps), "step")
        message = f"{found} could be held against the one before, {limits.min_steps} are needed"
        raise UnjudgedError(message)
    portion = float(fits[judged].mean())
    if portion < limits.min_share:
        return
    loss = progress(run)
    first, last = int(steps[0]), int(steps[-1])
    cosines = median(parts.cosine[1:], axis=0)
    growth = parts.norm / np.where(measured(parts.arrived), parts.arrived, np.nan)
    largest = float(np.nanmax(growth))
    names = [entity.name for entity in parts.entities]
    worst = np.argsort(cosines, kind="stable")[:2]
    yield gradients_not_cleared.finding(
        Severity.ERROR if loss.failed else Severity.WARNING,
        None,
        f"In {share(portion)} of what could be compared, the gradient is that of the step before "
        f"plus what this step's backward pass brought, up to {number(largest)} times as long as "
        f"the latter: .grad is not cleared; {loss.words}.",
        evidence=(
            Evidence("g - g₋₁ = Σδ", None, first, last, portion, limits.min_share),
            *(
                Evidence("grad_balance_cosine", names[column], first, last, float(cosines[column]))
                for column in worst
            ),
        ),
        remedies=(
            "Call optimizer.zero_grad() once for every optimizer.step(): after it, or before "
            "backward().",
            "To accumulate over k batches on purpose, divide the loss by k, and call step() and "
            "zero_grad() together at every k-th batch.",
        ),
    )


def _adds_up(parts: Balance, limits: Limits) -> tuple[Bools, Bools]:
    """Per step but the first, and bias: whether it does, and whether that can be told.

    g = k·(g₋₁ + δ), from ⟨g, g₋₁⟩, ⟨g, δ⟩ and the three lengths: multiplied by g it gives k, and
    then |g/k - g₋₁| = |δ| is what it has to fulfil.
    """
    gradient, before, arrived = parts.norm[1:], parts.norm[:-1], parts.arrived[1:]
    in_a_row = (np.diff(parts.steps) == 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        with_before = parts.previous[1:] * gradient * before
        with_arrived = parts.share[1:] * arrived**2
        factor = gradient**2 / (with_before + with_arrived)
        square = (gradient / factor) ** 2 - 2 * with_before / factor + before**2
        off = np.abs(square - arrived**2) / arrived**2
        judged: Bools = in_a_row & np.isfinite(off) & (before > 0)
        judged &= arrived > limits.smallest * gradient
        # Of a gradient that has just become many times larger, too, one can't tell what is in it.
        judged &= before > _BESIDE * limits.tolerance * arrived
        exact = (np.abs(factor - 1) < limits.tolerance) & (off < limits.tolerance)
        # The closer all of them are to one direction, the more multiples fit: what counts is what
        # lies across the gradient.
        across = 1 - np.minimum(parts.cosine[1:] ** 2, 1.0)
        clipped = (factor > 0) & (factor < 1) & (off < limits.tolerance * across)
    fits: Bools = judged & (exact | clipped)
    return fits, judged
