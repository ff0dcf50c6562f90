"""GS401 update-too-large."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress, stuck_before
from gradscope.analysis.layers import module_of
from gradscope.analysis.optimizers import optimizers
from gradscope.analysis.robust import F64, Bools, measured, median
from gradscope.analysis.rule import rule
from gradscope.analysis.updates import Updates, updates
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an update counts as too large; sizes are relative to the weight."""

    # "Not 50 percent" of a weight in one step (Goodfellow et al. 2016, after Bottou).
    once: float = 0.5
    # DeepDiagnosis' and TheDeepChecker's upper bound. Healthy trainings cross it in their first
    # steps, so that only its return counts …
    often: float = 0.1
    # … in a tenth of the steps: measured on healthy runs whose loss rests at its noise, 6 %.
    min_share_of_steps: float = 0.1
    # A step as large as the weight leaves nothing of it …
    replaced: float = 1.0
    # … and throws the loss back this far. Spikes of twofold are the catapult, and heal.
    recoil: float = 3.0
    # The highest loss after a step over that before: a step that did good (a hinge that is met
    # at once) leaves 0.5 to 0.8 of it.
    lowered: float = 0.9
    # Small steps that add up to this: of weights ten times as large nothing was tuned for.
    outgrown: float = 10.0
    # Without a loss to judge by: L-BFGS reaches 5 in the first step of healthy runs.
    extreme: float = 10.0


# Learning layers move by 1e-2 to 1e-4 of themselves in a step; the upper end is what to aim at.
_TYPICAL = 1e-2
# What the blow-up itself made of the ratio is no measure of the learning rate.
_LARGEST_FACTOR = 1e4
# From there on weights count as growing.
_DOUBLED = 2.0
# A momentum beyond what is in use.
_ALMOST_ONE = 0.99
# A NaN that a large update made comes within so many records of it.
_RECORDS_BEFORE = 3
_WINDOW = 5


@rule("GS401", name="update-too-large", requires=("parameters.update_norm",), limits=Limits())
def update_too_large(run: Run, limits: Limits) -> Iterator[Finding]:
    """Steps change weights by as much as they are.

    ## What it measures
    The norm of each weight's change in a step over the norm of the weight (for weights that
    start near zero, over that of PyTorch's default initialization). Half of a weight in one step
    counts, or a tenth of it in a tenth of the steps; or smaller ones that add up, where most
    weights have become ten times as large, and the loss is stuck.

    ## Why it matters
    The gradient is the slope at the old weights. A step of their own size ends where the slope
    says nothing: the loss jumps, activations saturate or die, the numbers overflow. What is left
    often looks like another fault: dead ReLUs, a constant output, NaN.

    ## How sure it is
    Certain as to the size of the steps. That they are the cause is likely, where the loss is
    stuck or has broken.

    ## Known limits
    Without harm it is information: normalized networks, L-BFGS and the first steps of Adam take
    large steps and learn. Biases, norms and embeddings are not judged. A blow-up that begins and
    ends between two recorded steps is not seen; `every=1` sees it.

    ## Example
    `torch.optim.Adam(model.parameters(), lr=1.0)`: Adam's first step changes every entry by the
    learning rate, ten times its size in a layer of width 64. Do instead: `lr=1e-3`.

    ## References
    Goodfellow, Bengio & Courville 2016, section 11.4; Karpathy, cs231n, "ratio of weights :
    updates"; Cao et al. 2022 (DeepDiagnosis, ICSE); Lewkowycz et al. 2020 (arXiv:2003.02218) on
    the catapult.
    """
    moved = updates(run)
    largest = moved.largest
    thrown, shaken = largest >= limits.once, largest >= limits.often
    if not thrown.any() and moved.share_of_steps(shaken) < limits.min_share_of_steps:
        yield from _adding_up(run, moved, limits)
        return
    first = _begin(thrown, shaken)
    peak = first + int(np.argmax(largest[first:]))
    step, last = int(moved.steps[first]), int(moved.steps[np.flatnonzero(shaken)[-1]])
    worst = _worst(moved, peak)
    loss = progress(run)
    recoil = _recoil(run, step)
    rate = _rate_at(run, step)
    names = [moved.entities[column].name for column in worst]
    jump = f", and the loss rose {number(recoil)}-fold after it" if recoil >= limits.recoil else ""
    of_rate = "" if math.isnan(rate) else f" at a learning rate of {number(rate)}"
    message = (
        f"Step {int(moved.steps[peak])} changed the weight of "
        f"{layer_in_words(module_of(names[0]))} by {number(float(largest[peak]))} times its size"
        f"{of_rate}{jump}; {_loss_in_words(run, loss, int(moved.steps[peak]))}."
    )
    yield update_too_large.finding(
        _severity(run, moved, step, recoil, limits),
        module_of(names[0]),
        message,
        evidence=tuple(
            Evidence("update_ratio", name, step, last, size, limits.often)
            for name, size in zip(names, moved.sizes[peak, worst].tolist(), strict=True)
        ),
        remedies=_remedies(rate, float(largest[first])),
    )


def _adding_up(run: Run, moved: Updates, limits: Limits) -> Iterator[Finding]:
    """Steps none of which is large, in a direction that stays: a momentum of almost one."""
    names = [entity.name for entity in moved.entities]
    columns = [run.parameters.names.index(name) for name in names]
    growth: F64 = run.parameters["weight_norm"][:, columns] / moved.initial
    typical = median(growth, axis=1)
    known = typical[measured(typical)]
    loss = progress(run)
    if not known.size or known[-1] < limits.outgrown or not loss.failed:
        return
    begin = int(np.argmax(typical >= _DOUBLED))
    first, last = int(moved.steps[begin]), int(moved.steps[-1])
    if stuck_before(run, first):
        return
    worst = int(np.argmax(np.nan_to_num(growth[-1])))
    momentum = max((s.values.get("momentum", 0.0) for s in optimizers(run)), default=0.0)
    rate = _rate_at(run, first)
    yield update_too_large.finding(
        Severity.ERROR,
        module_of(names[worst]),
        f"Steps of up to {number(float(moved.largest.max()))} times a weight have added up: half "
        f"of the weights have grown more than {number(float(known[-1]))}-fold, that of "
        f"{layer_in_words(module_of(names[worst]))} {number(float(growth[-1, worst]))}-fold; "
        f"{loss.words}.",
        evidence=(
            Evidence(
                "weight_norm, at last / at first",
                names[worst],
                first,
                last,
                float(growth[-1, worst]),
                limits.outgrown,
            ),
        ),
        remedies=(
            *_slower(momentum),
            *_remedies(rate, limits.outgrown * _TYPICAL),
        ),
    )


def _slower(momentum: float) -> tuple[str, ...]:
    if not _ALMOST_ONE < momentum < 1:
        return ()
    return (f"Lower the momentum: at {momentum:g} it makes {1 / (1 - momentum):.0f} steps of one.",)


def _loss_in_words(run: Run, loss: Progress, step: int) -> str:
    """What became of the loss since the step, which need not be where the run's loss began."""
    then = run.scalars["loss"][run.steps == step]
    fell = loss.verdict in {LossVerdict.LEARNING, LossVerdict.CONVERGED}
    if not fell or not then.size or not np.isfinite(then[0]):
        return loss.words
    return f"the loss was {number(float(then[0]))} then, and {number(loss.end)} at last"


def _begin(thrown: Bools, shaken: Bools) -> int:
    """The row at which the stretch of large updates began that led to the first very large one."""
    if not thrown.any():
        return int(np.flatnonzero(shaken)[0])
    begin = int(np.flatnonzero(thrown)[0])
    while begin and shaken[begin - 1]:
        begin -= 1
    return begin


def _worst(moved: Updates, peak: int) -> list[int]:
    """The columns of the three weights that moved farthest then."""
    sizes = np.where(np.isnan(moved.sizes[peak]), -np.inf, moved.sizes[peak])
    order = np.argsort(-sizes, kind="stable")[:3]
    return [int(column) for column in order if sizes[column] > 0]


def _severity(run: Run, moved: Updates, step: int, recoil: float, limits: Limits) -> Severity:
    loss = progress(run)
    largest = float(moved.largest.max())
    # A step after which the loss stayed lower was not what it got stuck by.
    lowered = largest < limits.replaced and recoil < limits.lowered
    if _led_to_nonfinite(run, moved, limits):
        return Severity.ERROR
    if loss.failed and not lowered and not stuck_before(run, step):
        return Severity.ERROR
    if loss.verdict is LossVerdict.UNKNOWN and math.isnan(recoil):
        return Severity.WARNING if largest >= limits.extreme else Severity.INFO
    judged = loss.verdict in {LossVerdict.UNKNOWN, LossVerdict.LEARNING}
    if judged and largest >= limits.replaced and recoil >= limits.recoil:
        return Severity.WARNING
    return Severity.INFO


def _led_to_nonfinite(run: Run, moved: Updates, limits: Limits) -> bool:
    """Whether large updates were among the last records before the loss or a gradient broke."""
    broken = run.scalars["nonfinite" if "nonfinite" in run.scalars else "loss_nonfinite"] > 0
    if not broken.any():
        return False
    before = moved.steps <= run.steps[np.flatnonzero(broken)[0]]
    recent = moved.largest[before][-_RECORDS_BEFORE:]
    return bool((recent >= limits.once).any())


def _recoil(run: Run, step: int) -> float:
    """The highest loss (smoothed) after the step over that before it; NaN without a loss."""
    loss = run.scalars["loss"].astype(np.float64)
    known = np.isfinite(loss)
    until = known & (run.steps <= step)
    after = loss[known & (run.steps > step)]
    if not until.any() or after.size < _WINDOW:
        return math.nan
    before = float(np.median(loss[until][-2 * _WINDOW :]))
    smooth: F64 = np.median(np.lib.stride_tricks.sliding_window_view(after, _WINDOW), axis=1)
    return float(smooth.max()) / before if before > 0 else math.nan


def _rate_at(run: Run, step: int) -> float:
    rates = run.scalars["learning_rate"][run.steps == step]
    return float(rates[0]) if rates.size else math.nan


def _remedies(rate: float, size: float) -> tuple[str, ...]:
    # Up to the next power of ten: a rate that is too small is found more easily.
    factor = 10.0 ** math.ceil(math.log10(min(size / _TYPICAL, _LARGEST_FACTOR)))
    to = "" if math.isnan(rate) or not rate else f": {number(rate)} → {number(rate / factor)}"
    return (
        f"Divide the learning rate by about {number(factor)}{to}.",
        "Scale inputs and targets to a standard deviation near 1, and average the loss over the "
        "batch (reduction='mean'): the gradient grows with all three.",
        "Ramp the learning rate up over the first steps (torch.optim.lr_scheduler.LinearLR), and "
        "clip with scope.clip_grad_norm_(1.0) under SGD.",
    )
