"""GS501 non-finite-loss."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.layers import ROOT
from gradscope.analysis.nonfinite import risky_operations
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a non-finite loss is a finding."""

    # A loss scaler skips such steps, and a bad batch comes now and then: more than one in ten
    # is neither.
    min_share_of_steps: float = 0.1


@rule("GS501", name="non-finite-loss", limits=Limits())
def non_finite_loss(run: Run, limits: Limits) -> Iterator[Finding]:
    """The loss is NaN or infinite.

    ## What it measures
    The steps at which the loss that was seen is NaN or infinite; every step, recorded or not.

    ## Why it matters
    A loss that is not a number says nothing of the model, and its gradient, if there is one,
    leads nowhere.

    ## How sure it is
    Certain. What made it so is told by the findings beside it.

    ## Known limits
    Needs a loss: logged, of a criterion, or in the model's output. A single step that recovers,
    as a GradScaler's, is not reported.

    ## Example
    `-(y * p.log() + (1 - y) * (1 - p).log())` on raw scores p. Do instead:
    `nn.functional.binary_cross_entropy_with_logits`.

    ## References
    IEEE 754-2019, section 6.
    """
    known = ~np.isnan(run.scalars["loss_nonfinite"])
    if not known.any():
        message = "no loss was seen"
        raise UnjudgedError(message)
    broken = run.scalars["loss_nonfinite"] > 0
    at = np.flatnonzero(broken)
    ends_so = bool(at.size) and bool(broken[np.flatnonzero(known)[-1]])
    if not ends_so and at.size <= limits.min_share_of_steps * known.sum():
        return
    first, last = int(run.steps[at[0]]), int(run.steps[at[-1]])
    before = "from the first step on" if at[0] == 0 else f"first at step {first}"
    yield non_finite_loss.finding(
        Severity.ERROR,
        None,
        f"The loss is NaN or infinite, {before}, at {at.size} of {int(known.sum())} steps"
        f"{_reason(run, first)}.",
        evidence=(Evidence("loss", None, first, last, float(run.scalars["loss"][at[0]])),),
        remedies=(
            "Use losses that take logits (nn.functional.cross_entropy, "
            "binary_cross_entropy_with_logits); a logarithm, division or root of your own needs "
            "a floor.",
            "Check inputs and targets for NaN, and targets for values outside their range.",
            "If it was finite at first: lower the learning rate, or clip the gradients.",
        ),
    )


def _reason(run: Run, step: int) -> str:
    """What is left to have made it so, where the model's output was still finite."""
    modules = run.modules
    if step not in modules.steps or ROOT not in modules.names:
        return ""
    row = int(np.searchsorted(modules.steps, step))
    if modules["output_nonfinite"][row, modules.names.index(ROOT)] != 0:
        return ""
    risky = risky_operations(run)
    made = f" takes {risky}" if risky else " made it"
    return f"; the model's output was finite then, and the loss{made}"
