"""GS204 clipping-dominates."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.robust import F64, Bools, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When clipping counts as what sets the size of the steps."""

    # Chance repeats a norm now and then, but not so often.
    min_steps: int = 20
    # "If more than 50 % of the updates are clipped" the learning rate should be lower instead:
    # Google's Deep Learning Tuning Playbook.
    clipped: float = 0.5
    # torch clips to max_norm·‖g‖/(‖g‖ + 1e-6), in the precision of the gradients: what is left
    # of a norm of 0.01 is short of max_norm by 1e-4 of it.
    same: float = 1e-4
    # A gradient that is the same in every step has a constant norm, too.
    change: float = 1e-2


@rule("GS204", name="clipping-dominates", requires=("parameters.grad_norm",), limits=Limits())
def clipping_dominates(run: Run, limits: Limits) -> Iterator[Finding]:
    """Most steps are clipped: their size is max_norm's, not the gradient's.

    ## What it measures
    The share of the steps that were clipped, where `scope.clip_grad_norm_` or
    `log(grad_norm=...)` tells the norm before. Where nothing does: whether the norm of what the
    optimizer is given stops at one and the same value, while the gradients themselves change.
    That is what clipping, or normalizing, before the step looks like.

    ## Why it matters
    Clipped gradients all have one length: a bad batch weighs as much as a good one, and the
    learning rate is in effect max_norm times what it says. Whatever is wrong with the size of
    the gradients is hidden.

    ## How sure it is
    Certain where the norm before clipping is known; likely where only a norm that never changes
    gives it away.

    ## Known limits
    Many language models are trained with clipping in most steps, and well; so it is information.
    A norm that is limited per parameter group, or in half precision, is not recognized.

    ## Example
    `clip_grad_norm_(parameters, 1.0)` where the norm is 30 in every step. Do instead: a learning
    rate that needs no clipping, or a max_norm near the 90th percentile of the norms.

    ## References
    Google's Deep Learning Tuning Playbook, "How can I debug and mitigate optimization
    failures?"; Pascanu et al. 2013, which introduced clipping against rare explosions.
    """
    at = np.searchsorted(run.steps, run.recorded_steps)
    given = run.scalars["grad_norm"][at].astype(np.float64)
    unknown = np.full(len(run.steps), np.nan)
    before = run.scalars.get("grad_norm_before_clip", unknown).astype(np.float64)
    if measured(before).any():
        clipped = run.scalars.get("clipped", unknown).astype(np.float64)
        if not measured(clipped).any():
            # Told by hand; what the optimizer was given is known of the recorded steps.
            after = unknown.copy()
            after[at] = given
            known = measured(before) & measured(after)
            clipped = np.where(known, after < (1 - limits.change) * before, np.nan)
        yield from _told(run, limits, clipped, before)
    else:
        yield from _suspected(run, limits, given)


def _told(run: Run, limits: Limits, clipped: F64, before: F64) -> Iterator[Finding]:
    known = measured(clipped)
    _check_enough(int(known.sum()), limits)
    portion = float(clipped[known].mean())
    if portion <= limits.clipped:
        return
    steps, norm = run.steps[known], float(np.nanmedian(before[known & (clipped > 0)]))
    yield clipping_dominates.finding(
        Severity.INFO,
        None,
        f"{share(portion)} of {len(steps)} steps were clipped; the gradient's global norm "
        f"before was {number(norm)} in the median of them.",
        evidence=(
            Evidence("clipped", None, int(steps[0]), int(steps[-1]), portion, limits.clipped),
        ),
        remedies=(
            "Lower the learning rate, or raise max_norm to about the 90th percentile of the norm.",
        ),
    )


def _suspected(run: Run, limits: Limits, norms: F64) -> Iterator[Finding]:
    known = np.isfinite(norms) & (norms > 0)
    _check_enough(int(known.sum()), limits)
    # Clipping limits from above: what was not clipped is smaller.
    most = float(norms[known].max())
    same = known & (norms >= (1 - limits.same) * most)
    amount = int(same.sum())
    if amount < limits.min_steps or amount <= limits.clipped * known.sum():
        return
    if not _changes(run, same, limits):
        return
    steps = run.recorded_steps[same]
    yield clipping_dominates.finding(
        Severity.INFO,
        None,
        f"The gradient's global norm is {most:.4g} in {amount} of {int(known.sum())} recorded "
        "steps: it looks clipped, or normalized, before gradscope sees it; "
        "scope.clip_grad_norm_ or log(grad_norm=...) tell the norm before.",
        evidence=(Evidence("grad_norm", None, int(steps[0]), int(steps[-1]), most, None),),
        remedies=(
            "Clip with scope.clip_grad_norm_(max_norm), which does the same and records the norm, "
            "or give the norm that yours returns to scope.log(grad_norm=...).",
        ),
    )


def _changes(run: Run, which: Bools, limits: Limits) -> bool:
    """Whether the gradients differ in these steps in something else than their global norm."""
    for quantity in ("grad_norm", "grad_absmax"):
        values = run.parameters[quantity][which].astype(np.float64)
        values = values[:, np.isfinite(values).all(axis=0)]
        low, high = values.min(axis=0), values.max(axis=0)
        if (high - low > limits.change * high).any():
            return True
    return False


def _check_enough(known: int, limits: Limits) -> None:
    if known < limits.min_steps:
        known_of = count(known, "step")
        message = f"the gradient's norm is known of {known_of}, {limits.min_steps} are needed"
        raise UnjudgedError(message)
