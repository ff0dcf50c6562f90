"""GS503 non-finite-gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.nonfinite import (
    inner_first,
    nonfinite_inputs,
    preceding,
    risky_operations,
    when,
)
from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import rule
from gradscope.analysis.scaling import skipped
from gradscope.analysis.words import layer_in_words
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a non-finite gradient is a finding."""

    # One NaN in what the optimizer is given poisons its weight and its moments for good.
    entries: int = 1


@rule(
    "GS503",
    name="non-finite-gradient",
    requires=("parameters.grad_nonfinite",),
    limits=Limits(),
)
def non_finite_gradient(run: Run, limits: Limits) -> Iterator[Finding]:
    """The optimizer was given NaN or infinity.

    ## What it measures
    The number of entries that are NaN or infinite in each gradient that an optimizer's step was
    given; at the first such step, also in outputs, output gradients and the model's input, to
    say where it began.

    ## Why it matters
    One such entry makes its weight NaN, and the momentum that remembers it; by the next forward
    the whole model is NaN, and nothing recovers.

    ## How sure it is
    Certain that the gradient was not finite. Where it began is certain only if that step was
    recorded.

    ## Known limits
    Steps that a GradScaler skips never reach the optimizer and do not count: a loss scale is
    meant to overflow now and then. Where it began is known only if that step was recorded; else
    the finding gives the interval.

    ## Example
    `loss = torch.log(prediction)` where a prediction is 0. Do instead: a loss on logits,
    `nn.functional.cross_entropy(logits, target)`.

    ## References
    IEEE 754-2019, section 6; Micikevicius et al. 2018 (ICLR), section 3.2, on loss scaling.
    """
    counts = np.nan_to_num(run.parameters["grad_nonfinite"])
    bad: Bools = np.asarray((counts >= limits.entries).any(axis=1)) & ~skipped(run)
    if not bad.any():
        return
    at = int(np.flatnonzero(bad)[0])
    step = int(run.parameters.steps[at])
    names = [run.parameters.names[i] for i in np.flatnonzero(counts[at] >= limits.entries)]
    held = int((~np.isnan(run.parameters["grad_nonfinite"][at])).sum())
    after = int(bad[at:].sum())
    origin, remedy, brought = _origin(run, at)
    message = (
        f"{len(names)} of {held} gradients held NaN or infinity {when(run.parameters, at)}"
        f"{origin}; "
        f"{'so did every recorded step' if bad[at:].all() else f'{after} recorded steps did so'} "
        "from then on."
    )
    yield non_finite_gradient.finding(
        Severity.ERROR,
        names[0],
        message,
        evidence=tuple(
            Evidence(
                "grad_nonfinite",
                name,
                step,
                int(run.parameters.steps[np.flatnonzero(bad)[-1]]),
                float(counts[at, run.parameters.names.index(name)]),
                float(limits.entries),
            )
            for name in names[:3]
        )
        + brought,
        remedies=(
            *remedy,
            "Stop the run and go back to a checkpoint from before that step: the weights do not "
            "recover.",
            "Lower the learning rate, or clip with scope.clip_grad_norm_(1.0), if the norms grew "
            "before it.",
        ),
    )


_Origin = tuple[str, tuple[str, ...], tuple[Evidence, ...]]


def _origin(run: Run, at: int) -> _Origin:
    """Where the first non-finite number was: in words, what to do, and evidence of the input."""
    step = int(run.parameters.steps[at])
    brought = nonfinite_inputs(run, step)
    if brought > 0:
        return (
            ", and so did the model's input",
            ("Check the data: the input of that batch holds NaN or infinity.",),
            (Evidence("nonfinite", "input", step, step, brought, 0.0),),
        )
    modules = run.modules
    if not modules.entities:
        return "", (), ()
    where = int(np.searchsorted(modules.steps, step))
    order = sorted(range(len(modules.entities)), key=lambda index: inner_first(modules, index))
    outputs = np.nan_to_num(modules["output_nonfinite"][where]) > 0
    backwards = np.nan_to_num(modules["output_grad_nonfinite"][where]) > 0
    for index in order:
        if outputs[index]:
            name = layer_in_words(modules.entities[index].name)
            advice = (
                f"Look at {name}: a logarithm, division, square root or exponential of an "
                "extreme value, or weights that have grown too large."
            )
            before = preceding(run, where, index)
            words = f", and the forward pass was broken first at the output of {name}{before}"
            return words, (advice,), ()
    for index in reversed(order):
        if backwards[index]:
            name = layer_in_words(modules.entities[index].name)
            risky = risky_operations(run)
            taken = f" (the loss takes {risky})" if risky else ""
            words = (
                "; the forward pass was finite, the gradient broke on its way back at the output "
                f"of {name} or behind it{taken}"
            )
            advice = f"Look at the derivative of what follows {name}: √x or |x|^p at 0, 0·∞."
            return words, (advice,), ()
    return "", (), ()
