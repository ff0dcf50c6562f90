"""GS302 saturated-activation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress, stuck_before
from gradscope.analysis.layers import activations, module_of, part_of
from gradscope.analysis.robust import F64, measured, since
from gradscope.analysis.rule import rule
from gradscope.analysis.signals import signal
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an activation counts as saturated."""

    # Half of the outputs: DeepDiagnosis' limit. Trained tanh layers reach 0.4 in order.
    share: float = 0.5
    # Three of four from the first step on: training did not choose it. No healthy run began
    # with more than 0.1.
    at_start: float = 0.75
    # Saturation that comes late may be what was learned; half of the steps is not late.
    min_share_of_steps: float = 0.5


# A single record may be an exception: of the first, of the last, and of how long it lasts.
_LEAST = 3
_BOUNDED = frozenset({"Tanh", "Hardtanh", "Softsign"})
# Beside other activations these are gates: open or closed is what they are for.
_GATES = frozenset({"Sigmoid", "Hardsigmoid"})
# Not between layers: what stands there says nothing of those that do.
_OUTPUTS = frozenset({"Softmax", "Softmax2d", "LogSoftmax", "Softmin"})
# Inputs of unit scale stay within this.
_LARGE_INPUT = 10.0


@dataclass(frozen=True, slots=True)
class _Layer:
    """One activation: since which row it is saturated, how much at first and at last."""

    entity: Entity
    onset: int
    first: float
    last: float


@rule("GS302", name="saturated-activation", limits=Limits())
def saturated_activation(run: Run, limits: Limits) -> Iterator[Finding]:
    """Hidden activations rest at the ends of their range, where they have no slope.

    ## What it measures
    The share of outputs of hidden Tanh, Sigmoid, Hardtanh, Hardsigmoid and Softsign, as
    modules or called as functions, whose derivative is below 6 % of its largest (tanh: |y| >
    0.97), up to the last recorded step.

    ## Why it matters
    The gradient is multiplied by that derivative. A unit at the end of its range passes on next
    to nothing, whatever the loss asks for, and its own weights hardly move.

    ## How sure it is
    Certain that the outputs are saturated. That this holds the training up is likely, where the
    loss is stuck.

    ## Known limits
    The output's activation is not judged: there saturation is confidence. Nor are sigmoids
    beside other activations, which are gates, nor what lies behind frozen layers. The
    inside of `nn.LSTM` and of compiled models is not seen. Unless the loss is stuck, or most
    outputs are saturated from the first step on, it is information.

    ## Example
    Weights from N(0, 1) in layers of width 64 before `nn.Tanh`: its inputs have a standard
    deviation of 8. Do instead: `nn.init.xavier_normal_(weight)`, and inputs of standard
    deviation 1.

    ## References
    Glorot & Bengio 2010 (AISTATS), section 3; Rakitianskaia & Engelbrecht 2015 (SSCI);
    Karpathy, makemore, part 3; Cao et al. 2022 (DeepDiagnosis, ICSE).
    """
    found = list(_layers(run, limits))
    if not found:
        return
    worst = max(found, key=lambda layer: (layer.last, -layer.entity.depth))
    from_start = [layer for layer in found if layer.first >= limits.at_start]
    shown = worst if not from_start else min(from_start, key=lambda layer: layer.entity.depth)
    loss = progress(run)
    steps = run.modules.steps
    others = len({part_of(layer.entity.name) for layer in found} - {part_of(shown.entity.name)})
    also = f" (and of {count(others, 'other layer')})" if others else ""
    onset = int(steps[shown.onset])
    # It began after the record before.
    too_late = stuck_before(run, int(steps[max(0, shown.onset - 1)]))
    when = "from the first step on" if shown.onset == 0 else f"since step {onset}"
    message = (
        f"{share(shown.last)} of the outputs of {layer_in_words(shown.entity.name)}{also} are "
        f"saturated, {when}; {loss.words}."
    )
    yield saturated_activation.finding(
        _severity(loss, from_start=bool(from_start), too_late=too_late),
        shown.entity.name,
        message,
        evidence=tuple(
            Evidence(
                "output_saturated_fraction",
                layer.entity.name,
                int(steps[layer.onset]),
                int(steps[-1]),
                layer.last,
                limits.share,
            )
            for layer in [shown, *(layer for layer in found if layer is not shown)][:3]
        ),
        remedies=_remedies(run, shown),
    )


def _layers(run: Run, limits: Limits) -> Iterator[_Layer]:
    """The hidden bounded activations that are saturated up to the end."""
    table = run.modules
    values = table["output_saturated_fraction"].astype(np.float64)
    for column in _judged(run):
        known = np.flatnonzero(measured(values[:, column]))
        shares: F64 = values[known, column]
        if known.size < _LEAST:
            continue
        begin = since(shares >= limits.share)
        if known.size - begin < max(_LEAST, limits.min_share_of_steps * known.size):
            continue
        yield _Layer(
            table.entities[column],
            int(known[begin]) if begin else 0,
            float(np.median(shares[:_LEAST])),
            float(np.median(shares[-_LEAST:])),
        )


def _judged(run: Run) -> list[int]:
    """The columns of bounded activations between layers with weights that can learn."""
    table = run.modules
    found = activations(run, _BOUNDED | _GATES)
    others = {e.type for e in table.entities if e.group == "activation"} - _GATES - _OUTPUTS
    types = _BOUNDED if others else _BOUNDED | _GATES
    held = held_weights(run)
    owners = {module_of(run.parameters.names[index]) for index in np.flatnonzero(held)}
    depths = [e.depth for e in table.entities if part_of(e.name) in owners]
    if not depths:
        return []
    return [
        column
        for column in found
        if table.entities[column].type in types
        and min(depths) < table.entities[column].depth < max(depths)
    ]


def _severity(loss: Progress, *, from_start: bool, too_late: bool) -> Severity:
    if loss.failed and not too_late:
        return Severity.ERROR
    unsure = loss.verdict in {LossVerdict.UNKNOWN, LossVerdict.LEARNING}
    return Severity.WARNING if from_start and unsure else Severity.INFO


def _remedies(run: Run, layer: _Layer) -> tuple[str, ...]:
    scale = _input_rms(run)
    words = f" (their rms is {number(scale)})" if scale >= _LARGE_INPUT else ""
    inputs = f"Scale the inputs{words} to mean 0 and standard deviation 1."
    start = (
        "Initialize with nn.init.xavier_normal_(weight) and biases at zero, so that the "
        "activation's inputs start near a standard deviation of 1."
    )
    rate = (
        "Lower the learning rate, or add weight decay (torch.optim.AdamW(…, weight_decay=0.01)): "
        "the weights have grown."
    )
    norm = "Put nn.LayerNorm or nn.BatchNorm before the activation, or replace it by ReLU or GELU."
    if layer.onset:
        return (rate, norm)
    return (inputs, start, norm) if words else (start, inputs, norm)


def _input_rms(run: Run) -> float:
    given = signal(run, "input")
    return math.nan if given is None else given.typical("rms")
