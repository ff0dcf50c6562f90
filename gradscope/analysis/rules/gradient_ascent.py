"""GS007 gradient-ascent."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.balance import balance
from gradscope.analysis.decay import decay_share
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.optimizers import optimizers
from gradscope.analysis.promises import promises
from gradscope.analysis.robust import F64, Bools, Numbers, measured, most
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import count, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When steps count as going uphill."""

    # A negated gradient has a cosine of -1 with what arrived, whether or not it was clipped.
    negated: float = -0.9
    # Beyond what an angle is by chance: of 100 entries two random directions have 0.1 (1/√n).
    along: float = 0.1
    # A reversed branch is a technique (Ganin & Lempitsky 2015); all of the model is not.
    layers: float = 0.9
    # Momentum carries a step uphill for a while, in part of the weights.
    min_share_of_steps: float = 0.8
    # The first steps of a run are no habit.
    min_steps: int = 3
    # What a step promises by its gradient is what it brings as long as it is a small part of the
    # loss (the first order of Taylor's series); a loss that rises by half of that, not by chance,
    # was promised to someone else.
    small: float = 0.3
    raised: float = 0.5


# Of the length of a change.
_HALF = 0.5
# Fewer small steps are chance, as is a rise within so many deviations of the loss's noise.
_MIN_SMALL = 5
# In so many of four quarters it has to rise.
_QUARTERS = 3
_CLEAR = 5.0


@rule("GS007", name="gradient-ascent", limits=Limits())
def gradient_ascent(run: Run, limits: Limits) -> Iterator[Finding]:
    """The steps raise the loss: along the gradient, or against a gradient that was negated.

    ## What it measures
    Of biases, the angle of the gradient with the sum of what arrived at the layer's output: -1
    where something negated it on its way to the optimizer. And the angle of each weight's change
    with its gradient: plain descent is at -1, Adam at -0.1 to -0.9; above zero in nearly all
    weights, from the first step on, while the loss rises, it is ascent. Of small steps, what the
    loss did beside what they promised by their gradients: one that was negated before
    `backward()` rises by as much as it should have fallen.

    ## Why it matters
    Each step makes the loss worse, by as much as it should have made it better: it grows without
    a bound, and ends in NaN.

    ## How sure it is
    Certain where the gradient's sign is read off the biases; likely where only the direction of
    the steps tells.

    ## Known limits
    Where `maximize=True` is set the ascent was asked for: then it is information. A loss that was
    negated before `backward()` is known only if it was logged with its old sign, and its steps
    were small and recorded one after the other. Without biases a gradient that was negated shows
    by the second angle alone, and momentum may hide that for a while. Where the loss falls all
    the same it is information.

    ## Example
    `p.grad.neg_()` in front of `optimizer.step()`, or `p.data += lr * p.grad` in a hand-written
    step. Do instead: leave the sign to the optimizer, or `maximize=True`.

    ## References
    Braiek & Khomh 2022 (TheDeepChecker, TOSEM), "flipped sign"; Ganin & Lempitsky 2015 (ICML), for
    the reversal of a branch that is in order; PyTorch's documentation of torch.optim.
    """
    arrived, along = balance(run).cosine, _along(run)
    told, moved = _any(arrived), _any(along)
    if not told.any() and not moved.any():
        message = "neither a bias's balance nor the angle of an update was measured"
        raise UnjudgedError(message)
    loss = progress(run)
    rising = most(along > limits.along, along, axis=1)
    uphill = _lasting(rising, moved, limits) and not _decays(run)
    against = (arrived <= limits.negated).sum(axis=1)
    turned: Bools = against >= limits.layers * measured(arrived).sum(axis=1)
    if _lasting(turned, told, limits):
        # Against a gradient that points the wrong way is the right way.
        if not _is_meant(run) and not uphill:
            yield _of_negated(run, loss, arrived, limits)
    elif uphill and _rose(loss):
        yield _of_steps(run, loss, along, limits)
    elif loss.failed and not _is_meant(run):
        yield from _of_promises(run, loss, limits)


def _any(values: Numbers) -> Bools:
    """Per step: whether anything was measured."""
    known: Bools = np.asarray(measured(values).any(axis=1))
    return known


def _along(run: Run) -> Numbers:
    """The cosine of each weight's change with its gradient, of shape (steps, weights)."""
    return run.parameters["update_gradient_cosine"][:, held_weights(run)]


def _lasting(holds: Bools, known: Bools, limits: Limits) -> bool:
    """Whether it holds at the first step that is known, and at most of those after it."""
    found = holds[known]
    if found.size < limits.min_steps:
        return False
    # No optimizer's first step has momentum.
    return bool(found[0] and found.mean() >= limits.min_share_of_steps)


def _decays(run: Run) -> bool:
    """Whether weight decay, which goes wherever the weights are, makes most of the change."""
    known = optimizers(run)
    if len(known) != 1:
        return False
    parts = decay_share(run, known[0], held_weights(run))
    return bool(measured(parts).any() and np.nanmedian(parts) > _HALF)


def _is_meant(run: Run) -> bool:
    return any(settings.values.get("maximize") for settings in optimizers(run))


def _rose(loss: Progress) -> bool:
    return loss.end > loss.start or loss.verdict is LossVerdict.NONFINITE


def _of_promises(run: Run, loss: Progress, limits: Limits) -> Iterator[Finding]:
    found = promises(run, limits.small)
    # Steps that overshoot turn the gradient round; steps uphill do not.
    if len(found.steps) < _MIN_SMALL or not found.turn > limits.along:
        return
    if found.change < max(limits.raised * found.fall, _CLEAR * found.chance):
        return
    # Not at once, as where the task or a layer is another from some step on.
    if (found.shares >= limits.raised).sum() < _QUARTERS:
        return
    yield gradient_ascent.finding(
        Severity.ERROR,
        None,
        f"{count(len(found.steps), 'small step')} should have lowered the loss by "
        f"{number(found.fall)}, by their gradients, and it rose by {number(found.change)}: what "
        f"is minimized is the opposite of this loss; {loss.words}.",
        evidence=(
            Evidence(
                "change of the loss / what the gradients promised",
                None,
                int(found.steps[0]),
                int(found.steps[-1]),
                -found.change / found.fall,
                -limits.raised,
            ),
        ),
        remedies=(
            "Take the minus sign away: loss.backward(), not (-loss).backward().",
            "If this loss is meant to rise, say so: watch(..., loss_is_progress=False).",
        ),
    )


def _of_negated(run: Run, loss: Progress, cosines: F64, limits: Limits) -> Finding:
    steps = run.recorded_steps[_any(cosines)]
    typical = float(np.nanmedian(cosines))
    fell = {LossVerdict.LEARNING, LossVerdict.CONVERGED}
    severity = Severity.INFO if loss.verdict in fell else Severity.WARNING
    return gradient_ascent.finding(
        Severity.ERROR if loss.failed else severity,
        None,
        "The gradients that the optimizer is given point against what the backward pass brought "
        f"(cosine {number(typical)}) in all layers: its steps raise the loss; {loss.words}.",
        evidence=(
            Evidence(
                "grad_balance_cosine",
                None,
                int(steps[0]),
                int(steps[-1]),
                typical,
                limits.negated,
            ),
        ),
        remedies=(
            "Look for what changes .grad between backward() and step(): neg_(), a factor below "
            "zero, a hook on the parameters.",
            "If the aim is to raise the loss, set maximize=True in the optimizer.",
        ),
    )


def _of_steps(run: Run, loss: Progress, cosines: Numbers, limits: Limits) -> Finding:
    meant = _is_meant(run)
    known = _any(cosines)
    steps, typical = run.recorded_steps[known], float(np.nanmedian(cosines))
    portion = float(most(cosines > limits.along, cosines, axis=1)[known].mean())
    why = ", as maximize=True says" if meant else ""
    levels = {True: Severity.ERROR, False: Severity.WARNING}
    return gradient_ascent.finding(
        Severity.INFO if meant else levels[loss.failed],
        None,
        f"In {share(portion)} of the recorded steps most weights move along their gradient (cosine "
        f"{number(typical)}; descent is below zero){why}, and the loss went from "
        f"{number(loss.start)} to {number(loss.end)}.",
        evidence=(
            Evidence(
                "update_gradient_cosine",
                None,
                int(steps[0]),
                int(steps[-1]),
                typical,
                limits.along,
            ),
        ),
        remedies=(
            "Remove maximize=True if this loss is to fall."
            if meant
            else "Subtract the gradient from the weights: this step adds it.",
        ),
    )
