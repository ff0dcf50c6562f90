"""GS403 weight-decay-dominates."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.decay import decay_share
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import module_of
from gradscope.analysis.optimizers import Settings, only_optimizer
from gradscope.analysis.robust import F64, at_last, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When weight decay counts as what moves the weights."""

    # More than the loss has to say: at rest the two are equal, as they cancel (van Laarhoven 2017).
    share: float = 0.5
    # Half of what the weights were: with a stuck loss, more than a training that stands still
    # loses by 1e-4 or 1e-2 in thousands of steps …
    shrunk: float = 0.5
    # … and a tenth, where the loss does not tell: no initialization is as far off (GS104).
    collapsed: float = 0.1


@rule(
    "GS403",
    name="weight-decay-dominates",
    requires=("parameters.weight_norm", "parameters.grad_norm"),
    limits=Limits(),
)
def weight_decay_dominates(run: Run, limits: Limits) -> Iterator[Finding]:
    """Weight decay pulls the weights to zero faster than the loss can hold them.

    ## What it measures
    The share of weight decay in what moves each weight, from the optimizer's settings: in the
    change itself where it is decoupled (AdamW), else beside the gradient's length. And how far the
    weights have shrunk from the first recorded step to the last. Both for the typical weight: more
    than half, to less than half.

    ## Why it matters
    Decay does not know the loss. Stronger than the gradient, it takes the weights toward zero; the
    output becomes a constant, the gradients fade with the weights, and nothing brings them back.

    ## How sure it is
    Likely: the share of decay is calculated from the optimizer's settings, the weights'
    shrinking is measured.

    ## Known limits
    While the loss falls it is information. Once a model fits its data the gradient is small and
    decay is most of the step: in order as long as the weights keep their size. The settings are
    those of the first parameter group at its first step; with several optimizers it is not judged.
    A penalty that is part of the loss is part of the gradient. Behind a norm weights may shrink
    without harm.

    ## Example
    `SGD(lr=0.1, weight_decay=0.1)`: each step takes 1 % of every weight, 95 % in 300 steps. Do
    instead: `weight_decay=1e-4`, or 1e-2 with AdamW, whose decay is multiplied by a much smaller
    learning rate.

    ## References
    Loshchilov & Hutter 2019 (arXiv:1711.05101), on decay that is decoupled; van Laarhoven 2017
    (arXiv:1706.05350), on its balance with the gradient; Braiek & Khomh 2022 (TheDeepChecker,
    TOSEM), "over-regularisation"; StackOverflow 51028324.
    """
    settings = only_optimizer(run)
    if not settings.number("weight_decay") > 0:
        return
    held = held_weights(run)
    parts = decay_share(run, settings, held)
    left = _left(run.parameters["weight_norm"][:, held].astype(np.float64))
    if not measured(parts).any() or not measured(left).any():
        message = "no weight in an optimizer was measured"
        raise UnjudgedError(message)
    typical, kept = float(np.nanmedian(parts)), float(np.nanmedian(left))
    if not (typical > limits.share and kept < limits.shrunk):
        return
    loss = progress(run)
    if not loss.failed and kept >= limits.collapsed:
        return
    entities = [run.parameters.entities[column] for column in np.flatnonzero(held)]
    worst = entities[int(np.nanargmin(left))].name
    steps = run.recorded_steps
    first, last = int(steps[0]), int(steps[-1])
    yield weight_decay_dominates.finding(
        _severity(loss),
        None,
        f"Weight decay of {number(settings.number('weight_decay'))} makes {share(typical)} of what "
        f"moves the typical weight, which has shrunk to {share(kept)} of its first size (that of "
        f"{layer_in_words(module_of(worst))} to {share(float(np.nanmin(left)))}); {loss.words}.",
        evidence=(
            Evidence("share of weight decay", None, first, last, typical, limits.share),
            Evidence(
                "weight_norm, last / first",
                worst,
                first,
                last,
                float(np.nanmin(left)),
                limits.shrunk,
            ),
        ),
        remedies=_remedies(settings),
    )


def _left(norms: F64) -> F64:
    """Per weight: its last norm over its first."""
    first = at_last(norms[::-1])[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: F64 = at_last(norms)[0] / np.where(first > 0, first, np.nan)
    return ratio


def _severity(loss: Progress) -> Severity:
    if loss.failed:
        return Severity.ERROR
    return Severity.WARNING if loss.verdict is LossVerdict.UNKNOWN else Severity.INFO


def _remedies(settings: Settings) -> tuple[str, ...]:
    strength, usual = settings.number("weight_decay"), 1e-2 if settings.decays_decoupled else 1e-4
    to = number(min(usual, strength / 100))
    return (
        f"Set weight_decay to about {to} in place of {number(strength)}, or to 0 until the loss "
        "falls.",
        "A decay that is coupled to Adam is divided by √v̂ like a gradient: torch.optim.AdamW keeps "
        "it apart."
        if settings.is_adam and not settings.decays_decoupled
        else "What a step takes of the weights is the learning rate times weight_decay: lower it "
        "when you raise the learning rate.",
    )
