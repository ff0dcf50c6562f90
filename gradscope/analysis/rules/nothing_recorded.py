"""GS001 nothing-recorded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.coverage import elsewhere
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.scaling import skipped
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When nothing counts as recorded."""

    # One step with one gradient is something.
    steps: int = 1


_MANY = "optimizer steps were seen, but none was"


@rule("GS001", name="nothing-recorded", limits=Limits())
def nothing_recorded(run: Run, limits: Limits) -> Iterator[Finding]:
    """No gradient was recorded, so nothing can be said.

    ## What it measures
    The recorded steps in which at least one parameter had a gradient.

    ## Why it matters
    A report without findings would look like health, where in truth nothing was seen.

    ## How sure it is
    Certain that nothing was recorded; likely as to the reason, which follows from what the
    hooks counted.

    ## Known limits
    The reason that is given comes from what the hooks counted: forwards, optimizer steps. It
    can't know what was meant to happen.

    ## Example
    `gradscope.watch(model)` around a loop that trains a copy of the model. Do instead: watch the
    model that is trained, and the optimizer that steps.

    ## References
    wandb/wandb#1819 and #2749: monitors that stay silent, and users who can't find out why.
    """
    if other := elsewhere(run):
        raise UnjudgedError(other)
    read = (~np.isnan(run.parameters["grad_nonfinite"])).any(axis=1) & ~skipped(run)
    if int(read.sum()) >= limits.steps:
        return
    reason, remedy = _reason(run, run.meta.get("coverage", {}))
    yield nothing_recorded.finding(
        Severity.WARNING, None, f"No gradient was recorded: {reason}.", remedies=(remedy,)
    )


def _reason(run: Run, coverage: Mapping[str, Any]) -> tuple[str, str]:
    """Why there is none, and what to do about it."""
    return _of_records(run, coverage) if run.recorded_steps.size else _of_counts(run, coverage)


def _of_records(run: Run, coverage: Mapping[str, Any]) -> tuple[str, str]:
    if skipped(run).all():
        return (
            f"the GradScaler skipped all of the {run.recorded_steps.size} recorded steps",
            "Train for more steps: the scale halves until gradients are finite. If it goes on, "
            "look for NaN in the loss or the data.",
        )
    if coverage.get("parameters", {}).get("expected") == 0:
        return (
            "none of the parameters that are watched is trainable",
            "Watch parameters too: include and exclude choose them by name, 'encoder.*' say, "
            "which 'encoder' does not match.",
        )
    if (run.parameters["grad_missing"] == 0).any():
        return (
            "gradients arrived, but no optimizer that stepped holds the parameters they arrived at",
            "Build the optimizer from model.parameters() after the model is complete.",
        )
    return (
        f"in {run.recorded_steps.size} recorded steps every parameter's .grad was None",
        "Call loss.backward() before optimizer.step(), on a loss that depends on this model; "
        "look for .detach(), .item() or torch.no_grad() between them.",
    )


def _of_counts(run: Run, coverage: Mapping[str, Any]) -> tuple[str, str]:
    forwards, steps = coverage.get("forwards", 0), coverage.get("optimizer_steps", 0)
    if not forwards and not steps:
        return (
            "the model's forward never ran with gradients enabled, and no optimizer stepped",
            "Watch the very object that the loop calls, before the loop begins.",
        )
    if steps:
        seen = "optimizer step was seen, but it was not" if steps == 1 else _MANY
        return f"{steps:,} {seen} finished and recorded", "Train for more steps, or choose every=1."
    ran = "once" if forwards == 1 else f"{forwards:,} times"
    reason = f"the model ran {ran}, but no optimizer stepped on its parameters"
    if ended := _ended(run):
        return f"{reason}: {ended}", "Mend what ended the training before the first step."
    if coverage.get("optimizers_given"):
        return (
            reason,
            "Call step() of the optimizer that was given to watch(); another one that steps in its "
            "place has to be given instead.",
        )
    return (
        reason,
        "Give watch() the optimizer that holds model.parameters(), or call scope.step() "
        "before an update written by hand.",
    )


def _ended(run: Run) -> str:
    """What ended the training early, if something did."""
    said = (str(p.get("message")) for p in run.meta.get("problems", ()) if p["part"] == "training")
    return next(said, "")
