"""GS002 missing-gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import module_of, trainable_share
from gradscope.analysis.robust import Bools, measured
from gradscope.analysis.rule import rule
from gradscope.analysis.words import listed, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as missing."""

    # A branch may be idle for a step or two; DDP's find_unused_parameters judges by one.
    min_steps: int = 3
    # A severed majority is a mistake even if the rest learns; an unused head is a minority.
    majority: float = 0.5


@rule("GS002", name="missing-gradient", requires=("parameters.grad_missing",), limits=Limits())
def missing_gradient(run: Run, limits: Limits) -> Iterator[Finding]:
    """Trainable parameters in the optimizer that never get a gradient.

    ## What it measures
    Parameters that are trainable and held by an optimizer, and whose `.grad` was None at every
    recorded step.

    ## Why it matters
    Nothing can train them. Either they are not part of what the loss depends on, or the graph
    is severed between them and the loss, by `.detach()`, `.item()`, `.data`, NumPy, or a
    `torch.no_grad()` block.

    ## How sure it is
    Certain that no gradient came. Whether one was meant to is likely only where it is a
    warning: where the layers run before others that learn, or most of the model gets none.

    ## Known limits
    None is not zero: a head that this phase does not use, an expert that no token chose, are in
    order. So it is information, unless most of the parameters are concerned and the loss is
    stuck, or their layers ran before others that do learn. Set to zero instead of None
    (`zero_grad(set_to_none=False)`), an unused parameter is reported by GS003 zero-gradient.

    ## Example
    `features = encoder(x).detach()` in front of a head that is trained together with it. Do
    instead: leave out `.detach()`, or freeze the encoder with `requires_grad_(False)`.

    ## References
    pytorch/pytorch#57776, a request for a tool that names unused parameters; Zhang et al. 2021
    (AUTOTRAINER, ICSE).
    """
    table = run.parameters
    missing = table["grad_missing"]
    known = ~np.isnan(missing)
    held = (table["requires_grad"] == 1).any(axis=0) & (table["in_optimizer"] == 1).any(axis=0)
    enough = known.sum(axis=0) >= min(limits.min_steps, max(1, len(table.steps)))
    never = held & enough & ((missing == 1) | ~known).all(axis=0) & known.any(axis=0)
    # Where nothing at all has a gradient, GS001 says so.
    if not never.any() or not ((missing == 0) & held).any():
        return
    names = [table.names[i] for i in np.flatnonzero(never)]
    severed = _ran_before_the_learning(run, never, held & (missing == 0).any(axis=0))
    portion = trainable_share(run, never)
    loss = progress(run)
    steps = table.steps
    cut = f"; {listed(severed)} ran, so the graph is severed behind it" if severed else ""
    message = (
        f"{len(names)} of {int(held.sum())} parameters in the optimizer never got a gradient "
        f"({listed(names)}), {share(portion)} of the trainable weights{cut}."
    )
    yield missing_gradient.finding(
        _severity(loss, severed=bool(severed), most=portion >= limits.majority),
        module_of(names[0]),
        message,
        evidence=tuple(
            Evidence("grad_missing", name, int(steps[0]), int(steps[-1]), 1.0, 0.0)
            for name in names[:3]
        ),
        remedies=(
            "Look for .detach(), .item(), .data, .numpy() or torch.no_grad() between these "
            "layers and the loss.",
            "If they are meant to rest: requires_grad_(False), or leave them out of the optimizer.",
        ),
    )


def _ran_before_the_learning(run: Run, never: Bools, learning: Bools) -> list[str]:
    """Modules that ran with gradients enabled, whose output got none, before one that learns.

    A head that is not used runs, too, but nothing that learns comes after it.
    """
    modules = run.modules
    if not modules.entities:
        return []
    rows = {name: index for index, name in enumerate(modules.names)}
    reached: Bools = np.asarray(measured(modules["output_grad_norm"]).any(axis=0))
    names = run.parameters.names
    last = max(
        (
            modules.entities[rows[owner]].depth
            for owner in (module_of(names[i]) for i in np.flatnonzero(learning))
            if owner in rows
        ),
        default=-1,
    )
    owners = dict.fromkeys(module_of(names[i]) for i in np.flatnonzero(never))
    return [
        owner
        for owner in owners
        if owner in rows and not reached[rows[owner]] and modules.entities[rows[owner]].depth < last
    ]


def _severity(loss: Progress, *, severed: bool, most: bool) -> Severity:
    if loss.failed and most:
        return Severity.ERROR
    if severed and most and loss.verdict is not LossVerdict.CONVERGED:
        return Severity.WARNING
    return Severity.INFO
