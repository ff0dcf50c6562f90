"""GS506 loss-scale-collapse."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.robust import F64, Bools, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a loss scale counts as collapsed."""

    # Below 1 it makes gradients smaller, the opposite of its purpose; GradScaler starts at 65,536.
    scale: float = 1.0
    # An ordinary scaler skips one step in 2,000 (its growth_interval).
    skipped: float = 0.1
    # A few skips in the first few steps are the search that goes on.
    min_skips: int = 5
    min_steps: int = 20
    # As many halvings as lead from 2**24, the largest usual start, to 1.
    search: int = 24


@rule("GS506", name="loss-scale-collapse", limits=Limits())
def loss_scale_collapse(run: Run, limits: Limits) -> Iterator[Finding]:
    """The GradScaler keeps skipping steps, and its scale falls away.

    ## What it measures
    The loss scale at the last steps, and the share of steps that were skipped after the first one
    that was not; every step, recorded or not.

    ## Why it matters
    A GradScaler skips the step and halves the scale whenever a gradient is not finite. Where a
    smaller scale does not help, what overflows is not the scaled gradient but the network itself:
    every step is skipped, nothing is learned, and small gradients vanish at the small scale.

    ## How sure it is
    Certain as to the scale and the steps that were skipped. Why gradients overflow is told by
    other findings, if any.

    ## Known limits
    The search at the start, up to 24 skips in a row, and a skip now and then are what the scaler
    is for. Needs `watch(scaler=...)`, or the scale logged as `loss_scale`.

    ## Example
    A model whose forward overflows in float16 (GS505): the scale falls from 65,536 below 1 within
    17 steps. Do instead: bfloat16, or the layer that overflows in float32.

    ## References
    Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2; torch.amp.GradScaler's documentation.
    """
    unknown = np.full(len(run.steps), np.nan)
    scale = run.scalars.get("loss_scale", unknown).astype(np.float64)
    skips = run.scalars.get("skipped", unknown).astype(np.float64)
    known = measured(skips)
    if not measured(scale).any() and not (skips > 0).any():
        message = "no GradScaler was seen"
        raise UnjudgedError(message)
    last = _recent(scale)
    rows = _after_search(skips, known, limits)
    dropped = rows[skips[rows] > 0]
    portion = dropped.size / rows.size if rows.size else 0.0
    small = last < limits.scale and not np.isnan(last)
    often = (
        rows.size >= limits.min_steps
        and dropped.size >= limits.min_skips
        and portion > limits.skipped
    )
    if not small and not often:
        return
    # A fixed scale that someone chose, and with which nothing is skipped, is no collapse.
    if small and not (skips > 0).any() and not (scale > last).any():
        return
    loss = progress(run)
    seen = np.flatnonzero(measured(scale))
    first_step = int(run.steps[dropped[0]] if dropped.size else run.steps[seen[0]])
    begin = float(scale[seen[0]]) if seen.size else np.nan
    of = f"The loss scale went from {number(begin)} to {number(last)}" if seen.size else ""
    lost = f"{share(portion)} of the steps after the first search were skipped"
    stands_still = bool(rows.size and portion > _NEARLY_ALL)
    level = Severity.ERROR if loss.failed or stands_still else Severity.WARNING
    if LossVerdict.CONVERGED in {loss.verdict, loss.before} and not stands_still:
        level = Severity.INFO
    yield loss_scale_collapse.finding(
        level,
        None,
        f"{f'{of}, and {lost}' if of else lost}; {loss.words}.",
        evidence=(
            *(
                (Evidence("loss_scale", None, first_step, int(run.steps[-1]), last, limits.scale),)
                if seen.size
                else ()
            ),
            Evidence("skipped", None, first_step, int(run.steps[-1]), portion, limits.skipped),
        ),
        remedies=(
            "Use bfloat16 in place of float16 (torch.autocast(…, dtype=torch.bfloat16)): it needs "
            "no scale.",
            "Find the first output that is not finite, with the scaler off if need be: a forward "
            "that overflows does so at every scale (GS502, GS505).",
            "Lower the learning rate, or clip with scope.clip_grad_norm_(1.0) after "
            "scaler.unscale_(optimizer), if the gradients grew before it.",
        ),
    )


# What is left then is not a training.
_NEARLY_ALL = 0.9
_RECENT = 5


def _recent(scale: F64) -> float:
    """The scale of the last steps, as their median."""
    known = scale[measured(scale)][-_RECENT:]
    return float(np.median(known)) if known.size else np.nan


def _after_search(
    skips: F64, known: Bools, limits: Limits
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The steps after the first that was taken, or after so many skips as no search needs."""
    rows: np.ndarray[tuple[int], np.dtype[np.int64]] = np.flatnonzero(known)
    taken = np.flatnonzero(skips[rows] == 0)
    search = min(int(taken[0]) if taken.size else rows.size, limits.search)
    return rows[search:]
