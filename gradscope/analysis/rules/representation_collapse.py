"""GS310 representation-collapse."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import BINARY, LIKELIHOODS, loss_graph
from gradscope.analysis.harm import Progress, progress
from gradscope.analysis.lasting import lasting
from gradscope.analysis.layers import ROOT
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import signal
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When samples count as alike; similarities are mean cosines of different samples."""

    # What differs is then 3 % of what is common (1 - c = σ²/rms²). The last layers of trained
    # language models reach 0.99 in order (Ethayarajh 2019, arXiv:1909.00512).
    similarity: float = 0.999
    # Where no target asks for it, and training itself drew them together: embeddings that are
    # any use, and what decoders make of a code, stay below 0.9 in sound trainings.
    drawn: float = 0.99
    # Apart at first: then training made them alike, not the initialization.
    apart: float = 0.9
    # The inputs' own spread over their rms: at a tenth their similarity is 0.99.
    input_spread: float = 0.1
    # Few outputs, as values of actions, may rightly point one way.
    features: int = 8
    # A fifth of the records, as in GS003, and not fewer than a spike has.
    min_share_of_steps: float = 0.2
    min_steps: int = 5


@dataclass(frozen=True, slots=True)
class _Alike:
    """A module whose outputs are alike for all samples, since which row, and before."""

    entity: Entity
    onset: int
    first: float
    last: float


_LAYERS = frozenset({"linear", "convolution"})
# The first records, in their median: one may be an exception.
_FIRST = 3


@rule(
    "GS310",
    name="representation-collapse",
    requires=("modules.output_sample_similarity",),
    limits=Limits(),
)
def representation_collapse(run: Run, limits: Limits) -> Iterator[Finding]:
    """Samples that differ become alike on their way through the network.

    ## What it measures
    The mean cosine of the outputs of two different samples, at the last hidden layer and at the
    model's output: above 0.999 up to the last records although the inputs differ.

    ## Why it matters
    What follows such a layer gets the same vector for every sample, and can at best learn the best
    constant. It comes of an initialization that draws samples together layer by layer (the
    ordered phase), of a step that threw the weights into biases, or of a loss that a constant
    solves: two views of an image are most alike if all images are.

    ## How sure it is
    Certain that the outputs are alike while the inputs are not. That they should differ is
    likely, as the loss is stuck or training made them so.

    ## Known limits
    Where targets hardly differ from sample to sample, outputs should not either; and deep ReLU
    networks start close to 1 and leave it: without a stuck loss it is information, unless training
    itself drew the outputs together beyond 0.99 and the loss, which has no targets (or was said to
    be no progress), can't tell. Outputs of fewer than 8 numbers are not judged. Collapse onto a
    few dimensions is not seen.

    ## Example
    SimSiam without its stop-gradient: the loss falls to -1, its best value, and all embeddings
    are the same. Do instead: `z.detach()` for the other view, or a loss with negatives.

    ## References
    Schoenholz et al. 2017 (arXiv:1611.01232), on the ordered phase; Chen & He 2021
    (arXiv:2011.10566), section 4.1, on collapse; Dong et al. 2021 (arXiv:2103.03404).
    """
    hidden, output = _judged(run)
    if not _inputs_differ(run, hidden, limits):
        return
    inner = _alike(run, hidden[-1], limits) if hidden else None
    outer = _alike(run, output, limits) if output is not None else None
    drawn = _drawn_together(run, output, limits)
    outer = drawn or outer
    if drawn is None and inner is None and (outer is None or outer.first >= limits.apart):
        return
    loss = progress(run)
    begin = _begin(run, hidden, limits) if inner else outer
    shown = begin or inner
    if shown is None:
        return
    steps = run.modules.steps
    found = [each for each in (shown, outer) if each is not None]
    history = (
        "from the first step on"
        if shown.onset == 0
        else f"since step {int(steps[shown.onset])} ({number(shown.first)} at first)"
    )
    yield representation_collapse.finding(
        _severity(loss, inner, drawn, outer),
        shown.entity.name,
        f"Different samples have become alike at {layer_in_words(shown.entity.name)}: the mean "
        f"cosine of their outputs is {shown.last:.6g}, {history}; {loss.words}.",
        evidence=tuple(
            Evidence(
                "output_sample_similarity",
                each.entity.name,
                int(steps[each.onset]),
                int(steps[-1]),
                each.last,
                limits.similarity,
            )
            for each in dict.fromkeys(found)
        ),
        remedies=_remedies(shown, drawn=shown.first < limits.apart),
    )


def _judged(run: Run) -> tuple[list[Entity], Entity | None]:
    """The hidden modules in order of execution, and the model's output, else its last layer's."""
    table = run.modules
    known = np.flatnonzero(measured(table["output_sample_similarity"]).any(axis=0))
    ordered = sorted(
        (table.entities[column] for column in known),
        key=lambda entity: entity.depth,
    )
    layers = [entity for entity in ordered if entity.group in _LAYERS]
    if not layers:
        message = "no output of a layer with weights was compared between samples"
        raise UnjudgedError(message)
    head = layers[-1]
    hidden = [e for e in ordered if e.depth < head.depth and e.group != "container"]
    root = next((entity for entity in ordered if entity.name == ROOT), head)
    return [e for e in hidden if _features(e) > 1], root if _features(root) > 1 else None


def _features(entity: Entity) -> int:
    return entity.numel // max(1, entity.shape[0]) if entity.shape else 1


def _inputs_differ(run: Run, hidden: list[Entity], limits: Limits) -> bool:
    """Whether the samples' inputs are known to differ, or what the first layers make of them."""
    if (given := signal(run, "input")) is not None:
        spread, size = given.typical("sample_std"), given.typical("rms")
        if measured(np.array([spread, size])).all():
            return spread >= limits.input_spread * size > 0
    earlier = [_values(run, entity) for entity in hidden[:-1]]
    alike = 1 - limits.input_spread**2
    return any(float(np.nanmedian(values)) < alike for values in earlier)


def _values(run: Run, entity: Entity) -> F64:
    table = run.modules
    column = table.names.index(entity.name)
    values: F64 = table["output_sample_similarity"][:, column].astype(np.float64)
    return values


def _drawn_together(run: Run, output: Entity | None, limits: Limits) -> _Alike | None:
    """The output, if training made it the same for all samples, and no target asked for that."""
    if output is None or _features(output) < limits.features or _has_targets(run):
        return None
    found = _alike(run, output, replace(limits, similarity=limits.drawn))
    return found if found is not None and found.first < limits.apart else None


def _has_targets(run: Run) -> bool:
    """Whether the loss compares the output with something; unless known not to, it does."""
    if signal(run, "target") is not None:
        return True
    if not run.meta.get("loss_is_progress", True):
        return False
    try:
        graph = loss_graph(run)
    except UnjudgedError:
        return True
    return any(True for _ in graph.find(*LIKELIHOODS, *BINARY))


def _alike(run: Run, entity: Entity, limits: Limits) -> _Alike | None:
    values = _values(run, entity)
    onset = lasting(
        values,
        values > limits.similarity,
        least=limits.min_steps,
        share=limits.min_share_of_steps,
    )
    if onset is None:
        return None
    known = values[measured(values)]
    return _Alike(entity, onset, float(np.median(known[:_FIRST])), float(known[-1]))


def _begin(run: Run, hidden: list[Entity], limits: Limits) -> _Alike | None:
    """The first hidden module from which on all are alike."""
    begin = None
    for entity in reversed(hidden):
        found = _alike(run, entity, limits)
        if found is None:
            break
        begin = found
    return begin


def _severity(
    loss: Progress, inner: _Alike | None, drawn: _Alike | None, outer: _Alike | None
) -> Severity:
    if loss.failed:
        return Severity.ERROR if inner else Severity.WARNING
    # However well the loss goes: a constant may be what solves it.
    if drawn is not None or (outer is not None and inner is not None and loss.end < 0):
        return Severity.WARNING
    return Severity.INFO


def _remedies(shown: _Alike, *, drawn: bool) -> tuple[str, ...]:
    name = layer_in_words(shown.entity.name)
    if drawn:
        return (
            "Check that a constant does not solve the loss: embeddings need negatives, a stopped "
            "gradient on one side, or a term that keeps their variance.",
            "Lower the learning rate, or ramp it up: a large step can leave nothing but biases.",
            f"Look at what {name} and the layers before it are at that step: dead units, decayed "
            "weights.",
        )
    return (
        f"Put nn.BatchNorm or nn.LayerNorm before {name}, or residual connections around the "
        "layers before it: each draws the samples closer together.",
        "Scale the inputs to mean 0 and standard deviation 1, and start biases at zero: a common "
        "offset outweighs what differs.",
        "Initialize for the activation: nn.init.kaiming_normal_(weight, nonlinearity='relu') "
        "behind ReLU, nn.init.xavier_normal_(weight) behind tanh.",
    )
