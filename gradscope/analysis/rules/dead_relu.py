"""GS301 dead-relu."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress, stuck_before
from gradscope.analysis.lasting import lasting
from gradscope.analysis.layers import activations, module_of
from gradscope.analysis.robust import Bools, at_last, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights, updates
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When units count as dead."""

    # Half of a layer: SageMaker Debugger's and TheDeepChecker's limit; up to a third of the units
    # of an ordinary trained layer are dead.
    share: float = 0.5
    # What a tenth of the units lets through is little; healthy layers reach 0.83 on small tasks.
    nearly_all: float = 0.9
    # Units come back to life while a net still settles.
    min_share_of_steps: float = 0.2
    min_steps: int = 3


# Exactly zero, and with it their derivative, for half of all inputs; what leaks is never dead.
_RECTIFIERS = frozenset({"ReLU", "ReLU6", "Hardswish"})
# A single record may be an exception: of what came just before, and of what holds at last.
_LAST = 3
# In percent without decimals, what is not all must not look like it.
_NOT_ALL = 0.99


@dataclass(frozen=True, slots=True)
class _Layer:
    """One activation with dead units: since which row of the table, how many at last."""

    entity: Entity
    onset: int
    share: float


@rule("GS301", name="dead-relu", limits=Limits())
def dead_relu(run: Run, limits: Limits) -> Iterator[Finding]:
    """Units that are zero for every input.

    ## What it measures
    For each ReLU, ReLU6 and Hardswish, as a module or called as a function: the share of units
    that were zero for all of the last 256 recorded samples (of a convolution: channels, at every
    position). Not sparsity: a unit that fires for one sample in a hundred is alive.

    ## Why it matters
    Where a ReLU is zero its derivative is, too. A unit that is zero for every input gets no
    gradient for any, so nothing brings it back. Where a whole layer is dead, no layer before it
    gets a gradient, and the output is a constant.

    ## How sure it is
    Certain that the units were silent for all recorded samples; likely that they stay so: their
    gradient is zero, but the layers before may still move.

    ## Known limits
    Half of a layer may be dead without harm: then it is information. What is called inside a
    compiled model is not seen. Data that come in an order may leave units silent for a while.

    ## Example
    All biases at -2 on inputs in [0, 1], or a learning rate that throws the biases there in a
    single step: the loss rests at that of the best constant. Do instead: biases at 0, He
    initialization, a learning rate that does not (GS401), or `nn.LeakyReLU`.

    ## References
    Lu et al. 2019 (arXiv:1903.06733), on ReLUs born dead; Glorot, Bordes & Bengio 2011 (AISTATS),
    on sparsity that is in order; Zhang et al. 2021 (AUTOTRAINER, ICSE), section 3.
    """
    found = list(_layers(run, limits))
    if not found:
        return
    worst = max(found, key=lambda layer: (layer.share, -layer.entity.depth))
    loss = progress(run)
    blocked = worst.share == 1 and _nothing_behind(run, worst)
    steps = run.modules.steps
    others = sum(layer.share >= limits.share for layer in found) - 1
    also = f", and half or more in {count(others, 'other layer')}" if others else ""
    # It began after the record before.
    failed = loss.failed and not stuck_before(run, int(steps[max(0, worst.onset - 1)]))
    behind = "; no weight before it gets a gradient" if blocked else ""
    message = (
        f"{_amount(worst.share)} of {layer_in_words(worst.entity.name)} are dead{also}: "
        f"{_history(run, worst)}{behind}; {loss.words}."
    )
    yield dead_relu.finding(
        _severity(failed=failed and worst.share >= limits.nearly_all, blocked=blocked),
        worst.entity.name,
        message,
        evidence=tuple(
            Evidence(
                "dead_unit_fraction",
                layer.entity.name,
                int(steps[layer.onset]),
                int(steps[-1]),
                layer.share,
                limits.share,
            )
            for layer in sorted(found, key=lambda layer: (-layer.share, layer.entity.depth))[:3]
        ),
        remedies=_remedies(born=worst.onset == 0),
    )


def _layers(run: Run, limits: Limits) -> Iterator[_Layer]:
    """The rectifiers of which the share of units has been dead up to the end."""
    table = run.modules
    dead = table["dead_unit_fraction"].astype(np.float64)
    columns = activations(run, _RECTIFIERS)
    if columns and not measured(dead[:, columns]).any():
        message = (
            "too few inputs were recorded: 256 tell a dead unit from one that is quiet, "
            "and no activation had as many"
        )
        raise UnjudgedError(message)
    for column in columns:
        known = np.flatnonzero(measured(dead[:, column]))
        if not known.size:
            continue
        begin = lasting(
            dead[:, column],
            dead[:, column] >= limits.share,
            least=limits.min_steps,
            share=limits.min_share_of_steps,
        )
        if begin is None:
            continue
        # The first measurement waits for as many samples as make a unit dead: what is dead then
        # fell silent that much earlier.
        onset = max(0, begin - int(known[0]))
        yield _Layer(table.entities[column], onset, float(dead[known[-1], column]))


def _nothing_behind(run: Run, layer: _Layer) -> bool:
    """Whether every weight before the layer has had a gradient of exactly zero at last."""
    depth = dict(zip(run.modules.names, (e.depth for e in run.modules.entities), strict=True))
    names = run.parameters.names
    before: Bools = held_weights(run) & np.array(
        [depth.get(module_of(name), math.inf) < layer.entity.depth for name in names], dtype=bool
    )
    norms = at_last(run.parameters["grad_norm"][:, before], _LAST)
    return bool(before.any() and measured(norms).any() and not (np.nan_to_num(norms) > 0).any())


def _amount(portion: float) -> str:
    if portion == 1:
        return "All units"
    return f"{share(min(portion, _NOT_ALL))} of the units"


def _history(run: Run, layer: _Layer) -> str:
    """When they died; if they lived at first, the largest update until then."""
    if layer.onset == 0:
        return "they have been so from the first step on"
    steps = run.modules.steps
    before, after = int(steps[layer.onset - 1]), int(steps[layer.onset])
    words = f"half of the layer had died between step {before} and step {after}"
    try:
        moved = updates(run)
    except UnjudgedError:
        return words
    until = moved.largest[moved.steps <= before][-_LAST:]
    return f"{words}, after updates of up to {number(float(until.max(initial=0)))} times a weight"


def _severity(*, failed: bool, blocked: bool) -> Severity:
    if failed:
        return Severity.ERROR
    # A loss that falls all the same falls by what the output's bias can learn.
    return Severity.WARNING if blocked else Severity.INFO


def _remedies(*, born: bool) -> tuple[str, ...]:
    lower = "Divide the learning rate by 10, or ramp it up: a large step can kill a layer at once."
    start = (
        "Start the biases at zero and the weights with nn.init.kaiming_normal_(weight, "
        "nonlinearity='relu'), and scale the inputs to mean 0 and standard deviation 1."
    )
    leak = "Replace nn.ReLU by nn.LeakyReLU(0.01) or nn.GELU: they pass on a gradient everywhere."
    return (start, leak, lower) if born else (lower, leak, start)
