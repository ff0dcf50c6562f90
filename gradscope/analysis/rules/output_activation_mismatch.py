"""GS604 output-activation-mismatch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import (
    LAYERS,
    LIKELIHOODS,
    PARAMETER,
    REGRESSIONS,
    Graph,
    Node,
    loss_graph,
)
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.robust import measured
from gradscope.analysis.rule import rule
from gradscope.analysis.signals import Signal, signal
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When targets count as beyond what the output can reach."""

    # Of the output's range (of the targets' σ where it has no end): label noise and rounding
    # reach a little beyond, mean ± σ does not.
    margin: float = 0.1


# Where the outputs of an activation lie.
_RANGES = {
    "Sigmoid": (0.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Hardtanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
    "Softplus": (0.0, math.inf),
}
_BOUNDED = tuple(name for name, (_, high) in _RANGES.items() if high < math.inf)
# What the modules are called.
_MODULES = {"Relu": "ReLU"}
# What may stand between scores and their logarithm without making them positive.
_RESCALING = frozenset({"Add", "Clamp", "ClampMin", "Div", "Mul", "Rsub", "Sub"})

_CLIPPING = frozenset({"Add", "Clamp", "ClampMin", "Log"})

_USE_LOGITS = "Hand the scores of the last layer to F.cross_entropy: it takes the softmax itself."
_USE_BINARY_LOGITS = (
    "Hand the scores of the last layer to F.binary_cross_entropy_with_logits: it takes the "
    "sigmoid itself."
)


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """What is wrong at the end of the model, and how much of a loss of progress it takes.

    `activation` is the last op; `least` is the severity though the loss may fall.
    """

    activation: str
    words: str
    remedies: tuple[str, ...]
    least: Severity
    observed: float
    limit: float | None = None
    # A loss that breaks, though it was learning, is its work.
    breaks: bool = False


@rule("GS604", name="output-activation-mismatch", limits=Limits())
def output_activation_mismatch(run: Run, limits: Limits) -> Iterator[Finding]:
    """The model's last activation does not fit the loss.

    ## What it measures
    The end of the model and the loss in the autograd graph of the first recorded step: a softmax,
    sigmoid, tanh or ReLU whose output a cross-entropy takes for logits; a softmax over a single
    unit, over the batch, or over other than the classes; a negative log-likelihood of what is no
    logarithm; a logarithm of raw or rectified scores; and a regression whose targets lie beyond
    what the last activation can reach.

    ## Why it matters
    A softmax of a softmax can't be confident: with ten classes the loss can't fall below 1.46,
    and a tenth of the gradient comes through. A softmax over one unit is 1 whatever the weights,
    and nothing learns. The logarithm of a score that is zero or negative is -inf or NaN.

    ## How sure it is
    Certain that the two don't belong together: read from the autograd graph. That it was not
    meant is likely.

    ## Known limits
    A ReLU before a cross-entropy and the logarithm of raw scores are information as long as the
    loss falls. Only views may stand between the activation and the loss: a temperature, or a
    soft cap on logits, is no mismatch. Compiled models have no such graph.

    ## Example
    `nn.Sequential(..., nn.Softmax(1))` with `nn.CrossEntropyLoss()`. Do instead: leave the
    softmax out; at inference `logits.softmax(1)`.

    ## References
    Nikanjam et al. 2021 (NeuraLint, TOSEM), rules on last activation and loss; Nikanjam et al.
    2021 (TheDeepChecker, TOSEM), redundant softmax; Wardat et al. 2021 (DeepLocalize, ICSE).
    """
    graph = loss_graph(run)
    loss = progress(run)
    target = signal(run, "target")
    mismatches = (
        _single_unit(graph, loss),
        _wrong_dimension(graph, run),
        _not_logits(graph),
        _not_a_logarithm(graph),
        _logarithm_of_scores(graph),
        _out_of_reach(graph, target, limits),
    )
    # One end has one mistake; those that nothing learns with come first.
    found = next((mismatch for mismatch in mismatches if mismatch is not None), None)
    if found is None:
        return
    layer = _layer(run, found.activation)
    where = "" if layer is None else f" ({layer_in_words(layer)})"
    step = int(run.recorded_steps[0]) if run.recorded_steps.size else 0
    yield output_activation_mismatch.finding(
        _severity(loss, found),
        layer,
        f"{found.words.format(where=where)}; {loss.words}.",
        evidence=(Evidence(found.activation, layer, step, step, found.observed, found.limit),),
        remedies=found.remedies,
    )


def _severity(loss: Progress, found: _Mismatch) -> Severity:
    broken = found.breaks and loss.verdict is LossVerdict.NONFINITE
    return Severity.ERROR if loss.failed or broken else found.least


def _single_unit(graph: Graph, loss: Progress) -> _Mismatch | None:
    """A softmax over one unit, of the model's output or straight into a loss."""
    ends = set(graph.way(graph.output)) if graph.output is not None else set()
    for above in graph.find(*LIKELIHOODS, *REGRESSIONS, "BinaryCrossEntropy", "Log"):
        ends.update(_unclipped(graph, end) for end in graph.nodes[above].inputs)
    for index in graph.find("Softmax", "LogSoftmax"):
        node = graph.nodes[index]
        if index in ends and _size(node) == 1 and node.entries > 1:
            return _Mismatch(
                node.op,
                "The last softmax{where} is over a single unit: its output is 1 whatever the "
                "weights are, and no gradient passes it",
                (
                    _USE_BINARY_LOGITS,
                    "Or give the last layer one unit per class, and use F.cross_entropy.",
                ),
                # What falls then is another term of the loss.
                Severity.WARNING if loss.end < loss.start else Severity.ERROR,
                1.0,
                2.0,
            )
    return None


def _wrong_dimension(graph: Graph, run: Run) -> _Mismatch | None:
    """A softmax that is not over the classes that the loss picks from, or over the samples."""
    for index in graph.find(*LIKELIHOODS):
        given = graph.nodes[index].inputs[0] if graph.nodes[index].inputs else -1
        shape = graph.nodes[given].shape if given >= 0 else None
        at = _unclipped(graph, given)
        if shape is None or at < 0 or graph.nodes[at].op not in {"Softmax", "LogSoftmax"}:
            continue
        classes = shape[min(1, len(shape) - 1)] if shape else 0
        node = graph.nodes[at]
        beside = node.dim is not None and node.dim != min(1, len(shape) - 1)
        if _size(node) not in {0, classes} or (node.shape == shape and beside):
            return _over(node, f"the {classes} classes")
    samples = signal(run, "input")
    batch = samples.entity.shape[:1] if samples is not None else ()
    for index in graph.find(*REGRESSIONS, "BinaryCrossEntropy"):
        for end in graph.nodes[index].inputs:
            node = graph.nodes[graph.maker(end)] if end >= 0 else Node("")
            shape = node.shape or ()
            if node.op == "Softmax" and node.dim == 0 and len(shape) > 1 and shape[:1] == batch:
                return _over(node, "the units")
    return None


def _unclipped(graph: Graph, index: int) -> int:
    """What made these entries, or those that they are the logarithm of, clipped or with an ε."""
    at, seen = graph.maker(index), set[int]()
    while at >= 0 and at not in seen and graph.nodes[at].op in _CLIPPING:
        seen.add(at)
        operands = [used for used in graph.nodes[at].inputs if used >= 0]
        at = graph.maker(operands[0]) if len(operands) == 1 else -1
    return at


def _over(node: Node, instead: str) -> _Mismatch:
    last = "dim=1" if node.dim == 0 else "the dimension of the classes"
    over = "the batch" if node.dim == 0 else f"dimension {node.dim} of {list(node.shape or ())}"
    compete = "samples" if node.dim == 0 else "positions"
    return _Mismatch(
        node.op,
        f"The last softmax{{where}} is over {over} instead of {instead}: {compete} "
        "compete with each other",
        (f"Take the softmax over {last}, or leave it to F.cross_entropy.",),
        Severity.WARNING,
        float(node.dim or 0),
        1.0,
    )


def _not_logits(graph: Graph) -> _Mismatch | None:
    """A bounded or rectified output that the loss takes for logits."""
    for index in graph.find("LogSoftmax", "BinaryCrossEntropyWithLogits"):
        node = graph.nodes[index]
        at = graph.maker(node.inputs[0]) if node.inputs else -1
        name = graph.nodes[at].op if at >= 0 else ""
        if name in _BOUNDED:
            return _not_confident(node, name)
        if name == "Relu" and node.op == "LogSoftmax":
            return _Mismatch(
                name,
                "The scores that cross-entropy is given come out of a ReLU{where}: those below "
                "zero are cut off, and a class whose score is gets no gradient",
                (f"Leave the last ReLU out. {_USE_LOGITS}",),
                Severity.INFO,
                0.0,
            )
    return None


def _not_confident(node: Node, name: str) -> _Mismatch:
    low, high = _RANGES[name]
    activation = name.lower()
    if node.op != "LogSoftmax":
        # The better of what both classes can have.
        floor = math.log1p(math.exp(-high))
        return _Mismatch(
            name,
            f"The loss takes a {activation}'s output{{where}} for logits, and applies a sigmoid "
            f"of its own: of a positive sample it can't fall below {number(floor)}",
            (_USE_BINARY_LOGITS, f"Or keep the {activation}, and use F.binary_cross_entropy."),
            Severity.WARNING,
            floor,
        )
    classes = _size(node)
    floor = math.log(math.exp(high) + (classes - 1) * math.exp(low)) - high
    return _Mismatch(
        name,
        f"Cross-entropy takes a {activation}'s output{{where}} for logits, and applies a softmax "
        f"of its own: with {classes} classes it can't fall below {number(floor)}",
        (f"Leave the last {activation} out. {_USE_LOGITS}",),
        Severity.WARNING,
        floor,
    )


def _not_a_logarithm(graph: Graph) -> _Mismatch | None:
    """A negative log-likelihood of probabilities, or of raw scores."""
    for index in graph.find(*LIKELIHOODS):
        at = graph.maker(graph.nodes[index].inputs[0]) if graph.nodes[index].inputs else -1
        name = graph.nodes[at].op if at >= 0 else ""
        if name in {"Softmax", "Sigmoid"}:
            words = f"nll_loss is given a {name.lower()}'s output{{where}} without its logarithm"
            floor = -1.0
        elif _is_raw(graph, at):
            words = "nll_loss is given raw scores{where}, and has no lower bound"
            floor = -math.inf
        else:
            continue
        remedies = (_USE_LOGITS, "Or take the logarithm: F.nll_loss(scores.log_softmax(1), y).")
        return _Mismatch(name, words, remedies, Severity.WARNING, floor, 0.0)
    return None


def _logarithm_of_scores(graph: Graph) -> _Mismatch | None:
    """A logarithm of what may be zero or negative: raw or rectified scores."""
    for index in graph.find("Log", "Log2", "Log10"):
        for at in _rescaled(graph, index):
            name = graph.nodes[at].op
            if name == "Relu" or _is_raw(graph, at):
                kind = "rectified" if name == "Relu" else "raw"
                return _Mismatch(
                    name,
                    f"The loss takes the logarithm of {kind} scores{{where}}, not of "
                    "probabilities: it is -inf or NaN where one is zero or negative",
                    (_USE_LOGITS, f"For independent classes: {_USE_BINARY_LOGITS}"),
                    Severity.INFO,
                    0.0,
                    breaks=True,
                )
    return None


def _rescaled(graph: Graph, logarithm: int) -> Iterator[int]:
    """What the logarithm is taken of, through views, clamps, shifts and normalizing by a sum."""
    queue = list(graph.nodes[logarithm].inputs)
    seen: set[int] = set()
    for end in queue:
        at = graph.maker(end)
        if at < 0 or at in seen:
            continue
        seen.add(at)
        yield at
        node = graph.nodes[at]
        if node.op in _RESCALING and not _is_raw(graph, at):
            # Of a quotient or product the first that needs a gradient carries the sign.
            queue += [used for used in node.inputs if used >= 0][:1]


def _is_raw(graph: Graph, index: int) -> bool:
    """Whether this is what a layer put out: a product with weights, its bias added or not."""
    if index < 0:
        return False
    node = graph.nodes[index]
    if node.op == "Add" and len(node.inputs) > 1:
        return any(graph.nodes[at].op in LAYERS for at in map(graph.maker, node.inputs) if at >= 0)
    # A product of activations may be one of probabilities.
    weighted = any(at >= 0 and graph.nodes[graph.maker(at)].op == PARAMETER for at in node.inputs)
    return node.op in LAYERS and weighted and "Embedding" not in node.op


def _out_of_reach(graph: Graph, target: Signal | None, limits: Limits) -> _Mismatch | None:
    """A regression on targets that mostly lie beyond the range of the last activation."""
    if target is None:
        return None
    for index in graph.find(*REGRESSIONS, "Sub"):
        node = graph.nodes[index]
        if len(node.inputs) < 2 or -1 not in node.inputs:  # noqa: PLR2004  (output and target)
            continue
        at = graph.maker(max(node.inputs))
        name = graph.nodes[at].op if at >= 0 else ""
        if name not in _RANGES or graph.nodes[at].entries != target.entity.numel:
            continue
        low, high = _RANGES[name]
        mean, sigma = target.typical("mean"), target.typical("std")
        margin = limits.margin * (high - low if high < math.inf else sigma)
        below = mean - sigma < low - margin and _least(target) < low
        above = mean + sigma > high + margin and _most(target) > high
        if below or above:
            observed, limit = (_least(target), low) if below else (_most(target), high)
            ends = f"[{number(low)}, {number(high)}]" if high < math.inf else "[0, ∞)"
            return _Mismatch(
                name,
                f"The output comes out of a {name.lower()}{{where}} and lies in {ends}; targets "
                f"reach {number(observed)} (mean {number(mean)}, σ {number(sigma)})",
                (
                    "End the model with its last linear layer: a regression needs no activation.",
                    f"Or scale the targets into {ends}.",
                ),
                Severity.WARNING,
                observed,
                limit,
            )
    return None


def _least(target: Signal) -> float:
    return float(min(target["min"][measured(target["min"])], default=math.nan))


def _most(target: Signal) -> float:
    return float(max(target["max"][measured(target["max"])], default=math.nan))


def _size(node: Node) -> int:
    """Over how many entries it normalizes; 0 where that is not known."""
    return node.shape[node.dim] if node.shape and node.dim is not None else 0


def _layer(run: Run, op: str) -> str | None:
    """The last module that is such an activation."""
    kind = _MODULES.get(op, op)
    found = [entity for entity in run.modules.entities if entity.type == kind]
    return max(found, key=lambda entity: entity.depth).name if found else None
