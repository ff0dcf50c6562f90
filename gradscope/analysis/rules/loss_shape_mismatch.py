"""GS605 loss-shape-mismatch."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import REGRESSIONS, Graph, Node, Shape, loss_graph
from gradscope.analysis.harm import progress
from gradscope.analysis.rule import rule
from gradscope.analysis.signals import signal
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a broadcast in the loss is a mistake."""

    # A batch of two or three may have as many outputs as targets of another kind; of these on
    # it is no coincidence that both sides of the square are the batch.
    smallest_batch: int = 4


_DIFFERENCES = ("Sub", "Rsub")
# What a loss by hand makes of all pairs before it averages them. An exponential (of kernels), a
# minimum (of matchings) or a sum over one of the dimensions is meant to see all pairs.
_BEFORE_THE_MEAN = frozenset(
    {"Abs", "Add", "Clamp", "Div", "Mul", "Neg", "Pow", "Rsub", "Square", "Sub", "Where"}
)


@rule("GS605", name="loss-shape-mismatch", limits=Limits())
def loss_shape_mismatch(run: Run, limits: Limits) -> Iterator[Finding]:
    """The loss compares every output with every target.

    ## What it measures
    In the autograd graph of the first recorded loss: a difference of the model's output and
    something that needs no gradient, squared or absolute and averaged at once (or their product,
    in a cross-entropy by hand), which has the batch on two of its axes though the output has it
    on one: [B, 1] against [B] makes [B, B].

    ## Why it matters
    Each output is drawn to all targets alike, and the best it can do is their mean: the loss
    falls to their variance and rests there. Gradients, updates and activations look healthy all
    the while.

    ## How sure it is
    Certain that all pairs are compared: read from the autograd graph. That this was not meant
    is likely.

    ## Known limits
    All pairs can be meant: not judged are an output that was given its further axis in the loss
    (`unsqueeze`, `[:, None]`), losses that also compare outputs with each other, kernels,
    matchings, and targets that have the shape of the output. Needs the graph: compiled losses
    have none.

    ## Example
    `F.mse_loss(model(x), y)` with an output of [32, 1] and targets of [32]. Do instead:
    `F.mse_loss(model(x).squeeze(1), y)`; PyTorch's warning names both shapes.

    ## References
    PyTorch, "Broadcasting semantics", and the warning of `torch.nn.functional.mse_loss`;
    Nikanjam et al. 2021 (TheDeepChecker, TOSEM), on silent broadcasts.
    """
    graph = loss_graph(run)
    found = _broadcast(graph, limits)
    if found is None:
        return
    output, pairs = found
    target = signal(run, "target")
    shape = None if target is None else target.entity.shape
    # All pairs of what was logged alike are meant; a target may also come as a matrix.
    if shape in {output, pairs}:
        return
    other = "a target of another shape" if shape is None else f"a target of {_words(shape)}"
    step = int(run.recorded_steps[0]) if run.recorded_steps.size else 0
    yield loss_shape_mismatch.finding(
        Severity.ERROR,
        None,
        f"The loss compares every output with every target: an output of {_words(output)} meets "
        f"{other}, which makes {_words(pairs)}, and the best output is the targets' mean; "
        f"{progress(run).words}.",
        evidence=(Evidence("terms of the loss / samples", None, step, step, float(pairs[1]), 1.0),),
        remedies=_remedies(output),
    )


def _broadcast(graph: Graph, limits: Limits) -> tuple[Shape, Shape] | None:
    """The shapes of the output and of all its pairs with the target; None where they match."""
    for index in graph.find(*REGRESSIONS, *_DIFFERENCES, "Mul"):
        node = graph.nodes[index]
        output, pairs = _only_operand(node), node.shape
        if output >= 0 and graph.nodes[output].op == "Expand":
            output, pairs = _only_operand(graph.nodes[output]), graph.nodes[output].shape
        if output < 0 or pairs is None or not _is_squared(graph.nodes[output].shape, pairs):
            continue
        if pairs[0] < limits.smallest_batch or _is_meant(graph, output, pairs):
            continue
        # A product is that of a cross-entropy by hand only if it is one of the output.
        if node.op == "Mul" and not _is_of_the_output(graph, output):
            continue
        if node.op in REGRESSIONS or _is_averaged_at_once(graph, index, pairs):
            return graph.nodes[output].shape or (), pairs
    return None


def _only_operand(node: Node) -> int:
    """Its only argument that needs a gradient; -1 where there is none, or several."""
    operands = [at for at in node.inputs if at >= 0]
    return operands[0] if len(operands) == 1 else -1


def _is_of_the_output(graph: Graph, index: int) -> bool:
    """Whether it is the model's output, entry by entry, or a function of it."""
    shape, seen = graph.nodes[index].shape, set[int]()
    while index >= 0 and index not in seen and graph.nodes[index].shape == shape:
        if index == graph.output:
            return True
        seen.add(index)
        index = _only_operand(graph.nodes[index])
    return False


def _is_squared(output: Shape | None, pairs: Shape) -> bool:
    """Whether the batch came twice: [B] or [B, 1, …] became [B, B, …]."""
    batch, rest = pairs[:1], pairs[2:]
    squared = bool(pairs) and pairs[:2] == batch * 2
    return squared and (output == (*batch, 1, *rest) or (output == batch and not rest))


def _is_meant(graph: Graph, output: int, pairs: Shape) -> bool:
    """Whether the output got its further axis in the loss, or meets itself as well."""
    # As one column the output may be viewed out of habit; as [B, 1, D] it is not.
    chosen = {"Unsqueeze", "View"} if pairs[2:] else {"Unsqueeze"}
    for index in graph.way(output):
        if index == graph.output:
            break
        if graph.nodes[index].op in chosen:
            return True
    return any(_meets_itself(graph, graph.nodes[index], pairs) for index in graph.head)


def _meets_itself(graph: Graph, node: Node, pairs: Shape) -> bool:
    """Whether several that need a gradient make all pairs, none of which is all pairs already."""
    operands = [graph.nodes[at] for at in node.inputs if at >= 0]
    narrow = all(made.shape != pairs or made.op == "Expand" for made in operands)
    return node.shape == pairs and len(operands) > 1 and narrow


def _is_averaged_at_once(graph: Graph, difference: int, pairs: Shape) -> bool:
    """Whether all that is made of the differences ends in one number."""
    for index in graph.above(difference) - {difference}:
        node = graph.nodes[index]
        if node.shape != () and (node.shape != pairs or node.op not in _BEFORE_THE_MEAN):
            return False
    return True


def _words(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _remedies(output: Shape) -> tuple[str, ...]:
    narrow = (
        "Give the output the target's shape: loss_fn(output.squeeze(1), target), or "
        "target.unsqueeze(1).",
    )
    column = ("Give the target the output's shape: loss_fn(output, target.squeeze(1)).",)
    return (
        *(narrow if len(output) > 1 else column),
        "Assert it once before the loss: assert output.shape == target.shape.",
    )
