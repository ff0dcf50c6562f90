"""GS008 stale-optimizer-parameters."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.layers import ROOT, forgotten, module_of, trainable_share
from gradscope.analysis.robust import Bools, measured, since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, listed, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When what an optimizer holds counts as stale."""

    # A group may be added a step or two after the layer was replaced.
    min_steps: int = 3


@rule(
    "GS008",
    name="stale-optimizer-parameters",
    requires=("parameters.stale_in_optimizer",),
    limits=Limits(),
)
def stale_optimizer_parameters(run: Run, limits: Limits) -> Iterator[Finding]:
    """An optimizer steps on tensors that were the model's parameters once, and are no more.

    ## What it measures
    Tensors in the optimizers that step which were parameters of the model when watching began,
    or at a later recorded step, and are none now; and whether what has come in their place is
    trainable, gets gradients, and is in no optimizer.

    ## Why it matters
    The optimizer goes on with the old tensors, which nothing uses: what replaced them never
    learns, however long the training. Only a part of the model need be concerned, and then the
    loss may still fall.

    ## How sure it is
    Certain that the optimizer holds tensors that the model has no more. That this was not meant
    is likely where what came in their place is trained by nobody.

    ## Known limits
    Tensors that were replaced before watching began are unknown as such: an optimizer may well
    hold other models' parameters. Where all that the model has is trained, the old tensors cost
    memory, and it is information.

    ## Example
    `model.fc = nn.Linear(512, 10)` after `optimizer = SGD(model.parameters())`. Do instead:
    replace the layer first, then build the optimizer. The same for `load_state_dict(...,
    assign=True)` and `fully_shard(model)`, which replace every parameter.

    ## References
    pytorch/pytorch#14467, a request for an optimizer that warns of this; microsoft/nni#4521, where
    pruning replaced the layers, and the new ones were not trained.
    """
    table = run.parameters
    steps = table.steps
    if len(steps) < limits.min_steps:
        message = f"{count(len(steps), 'recorded step')}, {limits.min_steps} are needed"
        raise UnjudgedError(message)
    held = table["stale_in_optimizer"] == 1
    last = slice(-limits.min_steps, None)
    stale: Bools = held[last].all(axis=0)
    if not stale.any():
        return
    names = [table.names[index] for index in np.flatnonzero(stale)]
    begin = [int(steps[since(held[:, index])]) for index in np.flatnonzero(stale)]
    lost = forgotten(run, last) & _in_their_place(run, names)
    severity, consequence = Severity.INFO, "it updates what nothing uses"
    if lost.any():
        severity = Severity.ERROR if progress(run).failed else Severity.WARNING
        new = [table.names[index] for index in np.flatnonzero(lost)]
        consequence = (
            f"what the model has instead ({listed(new)}), {share(trainable_share(run, lost))} of "
            "the trainable weights, gets gradients but is in no optimizer that was seen"
        )
    yield stale_optimizer_parameters.finding(
        severity,
        module_of(names[0]),
        f"The optimizer holds {count(len(names), 'tensor')} that {_are(len(names))} the model's "
        f"no more, since step {min(begin)} ({listed(names)}): {consequence}.",
        evidence=tuple(
            Evidence("stale_in_optimizer", name, first, int(steps[-1]), 1.0, 0.0)
            for first, name in sorted(zip(begin, names, strict=True))[:3]
        ),
        remedies=(
            "Build the optimizer after the model is complete: after layers are replaced, "
            "load_state_dict(assign=True), fully_shard, and conversions that make new parameters.",
            "In mid-training build it anew, or add what is new: "
            "optimizer.add_param_group({'params': …}).",
        ),
    )


def _are(amount: int) -> str:
    return "is" if amount == 1 else "are"


def _in_their_place(run: Run, stale: list[str]) -> Bools:
    """Parameters of the same names, within the same modules, or that came later."""
    table = run.parameters
    owners = {module_of(name) for name in stale} - {ROOT}
    replacing = [
        name in stale or any(name.startswith(f"{owner}.") for owner in owners)
        for name in table.names
    ]
    came_later = ~measured(table["weight_norm"][:1]).any(axis=0)
    found: Bools = np.logical_or(replacing, came_later)
    return found
