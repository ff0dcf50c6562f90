"""GS502 non-finite-activation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.layers import module_of, part_of
from gradscope.analysis.nonfinite import (
    earliest,
    inner_first,
    nonfinite_inputs,
    preceding,
    when,
)
from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import rule
from gradscope.analysis.scaling import skipped
from gradscope.analysis.words import count, layer_in_words
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a non-finite activation is a finding."""

    # One NaN spreads to whatever is computed of it.
    entries: int = 1
    # A GradScaler, or the loop itself, may skip a bad step now and then: more than one in ten is
    # neither (as in GS501).
    min_share_of_steps: float = 0.1


@rule(
    "GS502",
    name="non-finite-activation",
    requires=("modules.output_nonfinite",),
    limits=Limits(),
)
def non_finite_activation(run: Run, limits: Limits) -> Iterator[Finding]:
    """The forward pass makes NaN or infinity of finite numbers.

    ## What it measures
    The entries of each module's output that are NaN or infinite: the first recorded step that has
    any although the model's input is finite, and in it the first module in order of execution.

    ## Why it matters
    What one module makes of finite numbers, all that follow hand on: the loss is NaN, so is every
    gradient, and after one update every weight. The first module tells what to mend; the loss and
    the gradients only that it happened.

    ## How sure it is
    Certain where the step was recorded: the first module whose output is not finite though its
    input is. Else an interval.

    ## Known limits
    Exact where that step was recorded; else the finding gives the interval, and none is made
    where weights may have been NaN before (GS503). Infinite values that reach neither the loss
    nor a gradient, as those of a mask, and a step that is skipped now and then, are information.

    ## Example
    `torch.exp(x)` as an activation on inputs up to 100: infinite in float32 from 89 on. Do
    instead: `nn.Softplus()` or `nn.ELU()`, and inputs of standard deviation 1.

    ## References
    IEEE 754-2019, sections 6 and 7; Micikevicius et al. 2018 (arXiv:1710.03740), section 3.3.
    """
    table = run.modules
    bad: Bools = np.nan_to_num(table["output_nonfinite"]) >= limits.entries
    rows = [
        int(row)
        for row in np.flatnonzero(bad.any(axis=1))
        if not nonfinite_inputs(run, int(table.steps[row]))
    ]
    if not rows:
        return
    row = rows[0]
    order = sorted(np.flatnonzero(bad[row]), key=lambda index: inner_first(table, int(index)))
    column = int(order[0])
    if _weights_may_have_been_broken(run, row, column):
        return
    name = table.names[column]
    others = len({part_of(table.names[index]) for index in order} - {part_of(name)})
    also = f", and of {count(others, 'module')} after it" if others else ""
    reached = _reaches(run, row)
    step, last = earliest(table, row), int(table.steps[rows[-1]])
    stays = bad[-1].any() or len(rows) > limits.min_share_of_steps * len(table.steps)
    share = "" if reached else "; neither the loss nor a gradient was"
    amount = f"{len(rows)} of {count(len(table.steps), 'recorded step')}"
    yield non_finite_activation.finding(
        Severity.ERROR if reached and stays else Severity.INFO,
        name,
        f"The output of {layer_in_words(name)}{also} held NaN or infinity {when(table, row)}, "
        f"while what came before it was finite{preceding(run, row, column)}; so it was in "
        f"{amount}{share}.",
        evidence=(
            Evidence(
                "output_nonfinite",
                name,
                step,
                last,
                float(table["output_nonfinite"][row, column]),
                float(limits.entries),
            ),
        ),
        remedies=_remedies(run, name),
    )


def _reaches(run: Run, row: int) -> bool:
    """Whether the loss or a gradient was not finite from then on, too."""
    first = earliest(run.modules, row)
    losses = (run.scalars["loss_nonfinite"] > 0)[run.steps >= first]
    gradients = np.nan_to_num(run.parameters["grad_nonfinite"])[run.parameters.steps >= first]
    backwards = np.nan_to_num(run.modules["output_grad_nonfinite"])[row:]
    return bool(losses.any() or (gradients > 0).any() or (backwards > 0).any())


def _weights_may_have_been_broken(run: Run, row: int, column: int) -> bool:
    """Whether steps are missing before the row, and it is the first weights that break it.

    Then a gradient may have been first, and have made them NaN.
    """
    table = run.modules
    if earliest(table, row) == int(table.steps[row]):
        return False
    depths = dict(zip(table.names, (entity.depth for entity in table.entities), strict=True))
    owners = {module_of(name) for name in run.parameters.names}
    first = min((depths[owner] for owner in owners if owner in depths), default=-1)
    gradients = np.nan_to_num(run.parameters["grad_nonfinite"]) > 0
    broken = gradients.any(axis=1) & ~skipped(run)
    then = run.parameters.steps <= table.steps[row]
    return bool(table.entities[column].depth <= first and broken[then].any())


def _remedies(run: Run, name: str) -> tuple[str, ...]:
    half = run.modules["output_grad_underflow_fraction"][:, run.modules.names.index(name)]
    wide = (
        f"Compute {layer_in_words(name)} in float32 (torch.autocast(…, enabled=False) around it), "
        "or use bfloat16: float16 ends at 65,504.",
    )
    return (
        *(wide if not np.isnan(half).all() else ()),
        f"Look at {layer_in_words(name)}: a logarithm, division, square root or exponential of an "
        "extreme value, or weights that have grown too large.",
        "Lower the learning rate, or clip with scope.clip_grad_norm_(1.0), if the numbers grew "
        "before it.",
        "Go back to a checkpoint from before that step: weights that are NaN do not recover.",
    )
