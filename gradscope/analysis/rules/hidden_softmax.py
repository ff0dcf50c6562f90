"""GS305 hidden-softmax."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.flow import MOVES, Flow, flow
from gradscope.analysis.harm import progress
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a softmax counts as hidden by mistake."""

    # One is enough: each divides the signal among its units (NeuraLint: softmax belongs last).
    amount: int = 1


# What a softmax may go through on its way to the next layer, and still be its activation.
_PASSED = MOVES | frozenset({"FusedDropout", "NativeBatchNorm", "NativeDropout", "NativeLayerNorm"})
_LAYERS = frozenset({"linear", "convolution"})
_SOFTMAX = frozenset({"Softmax", "Softmax2d", "LogSoftmax"})


@rule("GS305", name="hidden-softmax", limits=Limits())
def hidden_softmax(run: Run, limits: Limits) -> Iterator[Finding]:
    """A softmax between layers, where an activation should be.

    ## What it measures
    The autograd graph of the first recorded step: softmaxes whose output goes into a layer with
    weights (`nn.Linear`, a convolution), through nothing but reshapes, dropout and norms.

    ## Why it matters
    A softmax over n units gives each about 1/n, whatever comes in, and its derivative is at most
    1/4 and typically 1/n: the next layer sees almost a constant, and the layers before it almost
    no gradient. Its units compete, so that only one at a time can be learned from.

    ## How sure it is
    Certain that there is such a softmax: read from the autograd graph. That it was not meant is
    likely.

    ## Known limits
    Attention (a softmax multiplied with activations, or with a bare matrix of learned values),
    gates of experts and outputs are no finding. Relaxed categorical samples (Gumbel-softmax) go
    through such a softmax on purpose: unless the loss is stuck it is information. Compiled and
    checkpointed models hide their graph, and are not judged.

    ## Example
    `nn.Sequential(nn.Linear(64, 64), nn.Softmax(dim=-1), nn.Linear(64, 10))`. Do instead:
    `nn.ReLU()` between the layers, and the softmax only in the loss.

    ## References
    Nikanjam et al. 2021 (NeuraLint, TOSEM), rules f008 and f012; Goodfellow, Bengio & Courville
    2016, section 6.2.2.3, on how a softmax saturates.
    """
    graph = flow(run)
    hidden = [node for node in _reachable(graph) if _is_hidden(graph, node)]
    if len(hidden) < limits.amount:
        return
    loss = progress(run)
    entity = _entity(run, graph, hidden[-1])
    units = _units(graph, hidden[-1])
    over = f" over {units} units" if units else ""
    who = f"{layer_in_words(entity.name)}, a" if entity else "A"
    more = "" if len(hidden) == 1 else f" ({len(hidden)} of them)"
    first, last = (int(run.steps[0]), int(run.steps[-1])) if len(run.steps) else (0, 0)
    yield hidden_softmax.finding(
        Severity.ERROR if loss.failed else Severity.INFO,
        entity.name if entity else None,
        f"{who} softmax{over}{more} feeds a layer with weights, as an activation would; "
        f"{loss.words}.",
        evidence=(
            Evidence(
                "softmaxes before a layer with weights",
                entity.name if entity else None,
                first,
                last,
                float(len(hidden)),
                float(limits.amount),
            ),
        ),
        remedies=(
            f"Replace {_what(entity, len(hidden))} by nn.ReLU() or nn.GELU(): a softmax belongs "
            "behind the last layer, in attention, or in a gate.",
            "If probabilities are meant to go on (a relaxed categorical sample), lower its "
            "temperature slowly, and give the layers before it a larger learning rate.",
        ),
    )


def _reachable(graph: Flow) -> list[int]:
    """The softmaxes inside the model, the one nearest to the loss first."""
    region = graph.behind([0 if graph.output is None else graph.output])
    return [n for n in sorted(region) if graph.ops[n] in {"Softmax", "LogSoftmax"}]


def _is_hidden(graph: Flow, softmax: int) -> bool:
    """Whether all that takes it in, directly or passed on, is a layer with weights."""
    waiting, seen, feeds = [softmax], set(), False
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for taker, _ in graph.consumers[node]:
            if taker in graph.layers and graph.weight_is_a_layers(taker):
                feeds = True
            elif graph.ops[taker] in _PASSED or _is_mask(graph, taker):
                waiting.append(taker)
            else:
                return False
    return feeds


def _is_mask(graph: Flow, node: int) -> bool:
    return graph.ops[node] == "Mul" and -1 in graph.inputs[node]


def _units(graph: Flow, softmax: int) -> int | None:
    shape, dim = graph.shapes[softmax], graph.saved[softmax].get("dim")
    if not shape or not isinstance(dim, int):
        return None
    # autograd keeps a negative dimension as the 64 bits of an unsigned number.
    dim -= 2**64 if dim >= 2**63 else 0
    return shape[dim] if -len(shape) <= dim < len(shape) else None


def _entity(run: Run, graph: Flow, softmax: int) -> Entity | None:
    """The softmax as a module or a call: before the last layer, and of the node's shape."""
    entities = run.modules.entities
    last = max((e.depth for e in entities if e.group in _LAYERS), default=-1)
    found = [
        entity
        for entity in entities
        if entity.type in _SOFTMAX
        and entity.group == "activation"
        and entity.depth < last
        and entity.shape == graph.shapes[softmax]
    ]
    return min(found, key=lambda entity: entity.depth, default=None)


def _what(entity: Entity | None, amount: int) -> str:
    if entity is not None and amount == 1:
        return layer_in_words(entity.name)
    return "the softmax" if amount == 1 else f"the {amount} softmaxes"
