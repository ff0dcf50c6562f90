"""GS004 not-in-optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.layers import forgotten, module_of, trainable_share
from gradscope.analysis.robust import since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, listed, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a parameter counts as forgotten."""

    # Optimizers that take turns (a GAN's) have all been seen by then.
    min_steps: int = 3


@rule("GS004", name="not-in-optimizer", requires=("parameters.in_optimizer",), limits=Limits())
def not_in_optimizer(run: Run, limits: Limits) -> Iterator[Finding]:
    """Trainable parameters that get a gradient, but that no optimizer holds.

    ## What it measures
    Parameters with `requires_grad` to which gradients arrive, which are in no parameter group
    of a watched optimizer, and whose weights stayed the same at every recorded step.

    ## Why it matters
    They cost a backward pass, and never change. Typical causes: a layer that was added or
    replaced after the optimizer was built, a list of layers in a plain Python list, parameter
    groups that leave some out.

    ## How sure it is
    Certain, of the optimizers that were seen: membership and unchanged weights are both read,
    not estimated.

    ## Known limits
    An optimizer that `watch` was not told of and that has not stepped yet is unknown. A backbone
    that rests on purpose should say so with `requires_grad_(False)`; then it is not judged.

    ## Example
    `torch.optim.SGD(model.head.parameters())` where all of the model is to be trained. Do
    instead: `torch.optim.SGD(model.parameters())`.

    ## References
    PyTorch forum 84911, one of the silent errors studied in TrainCheck (OSDI'25).
    """
    table = run.parameters
    # As it is at the end: optimizers and layers may come and go.
    last = slice(-limits.min_steps, None)
    if len(table.steps) < limits.min_steps:
        message = f"{count(len(table.steps), 'recorded step')}, {limits.min_steps} are needed"
        raise UnjudgedError(message)
    trainable = (table["requires_grad"][last] == 1).all(axis=0)
    lost = forgotten(run, last)
    if not lost.any():
        return
    names = [table.names[i] for i in np.flatnonzero(lost)]
    loss = progress(run)
    steps = table.steps
    columns = (table["in_optimizer"][:, i] == 0 for i in np.flatnonzero(lost))
    first = [int(steps[since(outside)]) for outside in columns]
    yield not_in_optimizer.finding(
        Severity.ERROR if loss.failed else Severity.WARNING,
        module_of(names[0]),
        f"{len(names)} of {int(trainable.sum())} trainable parameters "
        f"({listed(names)}), {share(trainable_share(run, lost))} of the trainable "
        "weights, get gradients but are in no optimizer that was seen; they have not changed "
        f"since step {min(first)}.",
        evidence=tuple(
            Evidence("in_optimizer", name, begin, int(steps[-1]), 0.0, 1.0)
            for begin, name in sorted(zip(first, names, strict=True))[:3]
        ),
        remedies=(
            "Build the optimizer from model.parameters() after the model is complete, or add "
            "them: optimizer.add_param_group({'params': …}).",
            "If they are meant to rest: requires_grad_(False) on them saves their part of the "
            "backward pass, too.",
        ),
    )
