"""GS005 never-updated."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import module_of, trainable_share
from gradscope.analysis.optimizers import optimizers, rates_when_recorded
from gradscope.analysis.robust import F64, Bools, measured, median, most
from gradscope.analysis.rule import rule
from gradscope.analysis.words import count, listed, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a parameter counts as never updated."""

    # As long as an exactly zero gradient has to last (GS003): adapters and gates that start at
    # zero have left it by then.
    min_steps: int = 5
    # Of a whole weight a few entries are near zero, and move by however little: with entries from
    # U(-a, a) and steps that bfloat16 loses at 0.1·a, nine in ten stay (2⁻⁹ of each).
    lost: float = 0.9
    # Steps below half a unit in float32's last place are lost in any dtype: what is too small is
    # the step (GS402) or the gradient (GS101), not the dtype.
    too_small: float = 2.0**-24
    # Most of what could train.
    majority: float = 0.5
    # A norm's scale, a gate: that a net learns without it is in order (as in GS003).
    negligible: float = 0.01


# Of biases before a norm the gradient is round-off, and its steps are lost by structure.
_UNJUDGED = frozenset({"bias"})
# In percent without decimals, what is not all must not look like it.
_NOT_ALL = 0.99
# What moves half of its entries, or more, has a dtype that holds its steps.
_MOVES = 0.5


@dataclass(frozen=True, eq=False, slots=True)
class _Lost:
    """Per parameter: what steps leave of it, and how far they would take it."""

    unmoved: Bools
    mostly: Bools
    # Whether others that a smaller step would take less far do move.
    by_rate: Bools


@rule(
    "GS005",
    name="never-updated",
    requires=("parameters.update_lost_fraction",),
    limits=Limits(),
)
def never_updated(run: Run, limits: Limits) -> Iterator[Finding]:
    """Trainable parameters get gradients and are stepped on, and stay as they are to the bit.

    ## What it measures
    The share of the entries with a gradient that a step leaves as they were, at each recorded step
    whose learning rate is above zero: 1 in all of them, and the weight's norm the same; or nine in
    ten in most of the trainable weights. Whether weights whose steps are smaller still do move
    tells a learning rate of zero from a dtype that is too coarse.

    ## Why it matters
    A float holds a change only down to half a unit in its last place: 0.2 to 0.4 % of the weight
    in bfloat16, 0.02 to 0.05 % in float16. A step below it is rounded away, and the next one too:
    they do not add up. A learning rate of 1e-5 moves next to nothing in a model that was cast to
    bfloat16.

    ## How sure it is
    Certain that the weights stayed as they were, to the bit; likely as to the reason.

    ## Known limits
    The learning rate is known of the first parameter group alone. A layer that rests by a learning
    rate of zero, while the loss falls, is information; so are norms, whose scale of 1 is the first
    that bfloat16 can't move. An optimizer that keeps float32 copies of
    its own steps rarely on the weights that it shows: a norm's scale may rest for long. Where
    steps are too small for float32 too, GS402 or GS101 say so. Biases are not judged.

    ## Example
    `model.bfloat16()` and `Adam(lr=1e-6)`. Do instead: float32 weights, and
    `torch.autocast("cuda", dtype=torch.bfloat16)` around the forward pass.

    ## References
    Zamirai et al. 2020 (arXiv:2010.06192), on updates that bfloat16 cancels; Micikevicius et al.
    2018 (arXiv:1710.03740), section 3.1, on master copies; Zhang et al. 2021 (AUTOTRAINER, ICSE).
    """
    found = _lost(run, limits)
    table = run.parameters
    whole = found.unmoved | found.mostly
    shown = whole if trainable_share(run, whole) >= limits.majority else found.unmoved
    if not shown.any():
        return
    rests = bool(found.by_rate[shown].all())
    which = [table.names[column] for column in np.flatnonzero(shown)]
    loss = progress(run)
    kept = median(table["update_lost_fraction"][:, shown], axis=0)
    amount = (
        "no step has changed a bit of them"
        if found.unmoved[shown].all()
        else f"each step leaves {share(min(float(kept.min()), _NOT_ALL))} of their entries or more "
        "as they were"
    )
    portion = share(trainable_share(run, shown))
    norms = np.array([entity.group == "norm" for entity in table.entities], dtype=bool)
    steps = run.recorded_steps
    yield never_updated.finding(
        _severity(loss, trainable_share(run, shown & ~norms), limits, rests=rests),
        module_of(which[0]),
        f"{count(len(which), 'weight')} ({listed(which)}), {portion} of all that is trainable, "
        f"with a gradient: {amount}: {_reason(rests=rests)}; {loss.words}.",
        evidence=tuple(
            Evidence(
                "update_lost_fraction", name, int(steps[0]), int(steps[-1]), value, limits.lost
            )
            for name, value in list(zip(which, kept.tolist(), strict=True))[:3]
        ),
        remedies=_remedies(rests=rests),
    )


def _lost(run: Run, limits: Limits) -> _Lost:
    table = run.parameters
    lost = table["update_lost_fraction"].astype(np.float64)
    rate = rates_when_recorded(run)
    lost = np.where((rate == 0)[:, None], np.nan, lost)
    known = measured(lost)
    held = (table["requires_grad"] == 1).any(axis=0) & (table["in_optimizer"] == 1).any(axis=0)
    held &= np.array([entity.group not in _UNJUDGED for entity in table.entities], dtype=bool)
    held &= known.sum(axis=0) >= limits.min_steps
    unmoved = held & ((lost == 1) | ~known).all(axis=0) & _same(table["weight_norm"])
    mostly = held & most(lost >= limits.lost, lost, axis=0)
    nowhere = np.zeros_like(held)
    if not (unmoved | mostly).any():
        return _Lost(nowhere, nowhere, nowhere)
    step = _expected(run, rate, known)
    judged = ~(step < limits.too_small)
    moving = held & most(lost <= _MOVES, lost, axis=0) & measured(step)
    least = float(step[moving].min(initial=np.inf))
    return _Lost(unmoved & judged, mostly & judged, judged & (step >= least))


def _expected(run: Run, rate: F64, known: Bools) -> F64:
    """Per parameter: the size of a step relative to the weight, by the rate and the gradient.

    NaN: not known.
    """
    table = run.parameters
    known_settings = optimizers(run)
    length = table["grad_rms"].astype(np.float64)
    if any(settings.is_adaptive for settings in known_settings):
        # Adam's step is the learning rate, unless its ε is larger than the gradient.
        eps = max((s.number("eps") for s in known_settings if s.is_adam), default=0.0)
        length = np.minimum(length / eps, 1.0) if eps > 0 else np.ones_like(length)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = rate[:, None] * length / table["weight_rms"].astype(np.float64)
    return median(np.where(known, steps, np.nan), axis=0)


def _same(norms: "np.ndarray[tuple[int, ...], np.dtype[np.floating]]") -> Bools:
    """Whose norm is one and the same wherever it was measured."""
    known = measured(norms)
    low, high = np.where(known, norms, np.inf), np.where(known, norms, -np.inf)
    same: Bools = low.min(axis=0, initial=np.inf) >= high.max(axis=0, initial=-np.inf)
    return same


def _severity(loss: Progress, portion: float, limits: Limits, *, rests: bool) -> Severity:
    if portion < limits.negligible or LossVerdict.CONVERGED in {loss.verdict, loss.before}:
        return Severity.INFO
    if loss.failed:
        return Severity.ERROR if portion >= limits.majority else Severity.WARNING
    return Severity.INFO if rests else Severity.WARNING


def _reason(*, rests: bool) -> str:
    if rests:
        return "smaller steps move other weights, so that the learning rate of their group is zero"
    return "a step is too small for their dtype to hold"


def _remedies(*, rests: bool) -> tuple[str, ...]:
    if rests:
        return (
            "Look at the learning rates of all of optimizer.param_groups, and at what the "
            "scheduler makes of each.",
            "If they are meant to rest: requires_grad_(False) saves their part of the backward "
            "pass, too.",
        )
    return (
        "Keep the weights in float32, and compute in half precision: "
        "torch.autocast(device, dtype=torch.bfloat16) around the forward pass in place of "
        "model.bfloat16() or model.half().",
        "Use an optimizer that keeps float32 copies of the weights, or that rounds stochastically.",
        "Raise the learning rate: a step has to be at least 0.4% of a weight in bfloat16.",
    )
