"""How the signal flows through the autograd graph of the first recorded step.

Which nodes multiply activations with weights, what lies between them, and who takes what in.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gradscope.analysis.graph import PARAMETER, VIEWS, recorded_graph
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run

# Matrix products and convolutions → the positions of their two factors among the inputs.
_FACTORS = {
    "Addbmm": (1, 2),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Baddbmm": (1, 2),
    "Bmm": (0, 1),
    "Convolution": (0, 1),
    "CudnnConvolution": (0, 1),
    "Linear": (0, 1),
    "MkldnnConvolution": (0, 1),
    "MkldnnLinear": (0, 1),
    "Mm": (0, 1),
    "Mv": (0, 1),
}
# What they return depends on the data also where only weights go in.
_LOOKUPS = frozenset({"Embedding", "EmbeddingBag", "Gather", "Index", "IndexSelect"})
# They move entries about, and leave each as it is.
MOVES = VIEWS | frozenset(
    {
        "AsStrided",
        "Copy",
        "Expand",
        "Flip",
        "Repeat",
        "Roll",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Unbind",
    }
)
# Linear in all their inputs together; batch norm is at evaluation, dropout in the mean.
_LINEAR = (
    MOVES
    | _LOOKUPS
    | frozenset(
        {
            PARAMETER,
            "AdaptiveAvgPool2D",
            "AdaptiveAvgPool3D",
            "Add",
            "AvgPool2D",
            "AvgPool3D",
            "Cat",
            "ConstantPadNd",
            "CudnnBatchNorm",
            "Cumsum",
            "FusedDropout",
            "Mean",
            "MiopenBatchNorm",
            "NativeBatchNorm",
            "NativeDropout",
            "Neg",
            "Rsub",
            "Stack",
            "Sub",
            "Sum",
            "UpsampleBilinear2D",
            "UpsampleNearest1D",
            "UpsampleNearest2D",
        }
    )
)
_PRODUCTS = frozenset({"Bmm", "Div", "Mm", "Mul"})


@dataclass(frozen=True, eq=False)
class Flow:
    """The graph by node: what it does (`Addmm` for AddmmBackward0), and whose output it took.

    -1 among the inputs: what needs no gradient. `output` made the model's output; the loss's
    node is 0.
    """

    ops: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    saved: tuple[Mapping[str, Any], ...]
    output: int | None

    @cached_property
    def consumers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per node: who takes it in, and at which position."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.ops]
        for node, inputs in enumerate(self.inputs):
            for position, source in enumerate(inputs):
                if source >= 0:
                    found[source].append((node, position))
        return tuple(tuple(each) for each in found)

    @cached_property
    def _sources_first(self) -> tuple[int, ...]:
        done: dict[int, None] = {}
        for start in range(len(self.ops)):
            open_ = [start]
            while open_:
                node = open_[-1]
                waiting = [source for source in self.inputs[node] if source >= 0]
                waiting = [source for source in waiting if source not in done]
                if node not in done and waiting:
                    open_ += waiting
                else:
                    done[open_.pop()] = None
        return tuple(done)

    @cached_property
    def weights(self) -> frozenset[int]:
        """The nodes that are made of parameters alone: a weight, its transpose, a product of two.

        A constant may take part where the shape stays the weight's: a mask.
        """
        found: set[int] = set()
        for node in self._sources_first:
            inputs = self.inputs[node]
            known = [source for source in inputs if source >= 0]
            if self.ops[node] == PARAMETER:
                found.add(node)
            elif known and self.ops[node] not in _LOOKUPS and found.issuperset(known):
                shapes = [self.shapes[source] for source in known]
                masked = self.ops[node] not in _FACTORS and self.shapes[node] in shapes
                if len(known) == len(inputs) or masked:
                    found.add(node)
        return frozenset(found)

    @cached_property
    def layers(self) -> frozenset[int]:
        """The nodes that multiply an activation, or the model's input, with a weight."""
        found = set()
        for node, op in enumerate(self.ops):
            if op in _FACTORS and max(_FACTORS[op]) < len(self.inputs[node]):
                first, second = (self.inputs[node][position] for position in _FACTORS[op])
                if (first in self.weights) != (second in self.weights):
                    found.add(node)
        return frozenset(found)

    def activations(self, node: int) -> list[int]:
        """The nodes it takes in that depend on more than weights."""
        return [
            source for source in self.inputs[node] if source >= 0 and source not in self.weights
        ]

    def behind(self, starts: Collection[int], until: Collection[int] = ()) -> frozenset[int]:
        """These and all they depend on, but for weights, and no further than `until`."""
        found: set[int] = set()
        waiting = list(starts)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [] if node in until else self.activations(node)
        return frozenset(found)

    @cached_property
    def depth(self) -> int:
        """How many layers follow one another at most."""
        longest = [0] * len(self.ops)
        for node in self._sources_first:
            before = max((longest[source] for source in self.activations(node)), default=0)
            longest[node] = before + (node in self.layers)
        return max(longest, default=0)

    def weight_is_a_layers(self, node: int) -> bool:
        """Whether it multiplies as `nn.Linear` and convolutions do: with a bias, or transposed.

        A softmax times a bare matrix is attention over learned values.
        """
        factors = [self.inputs[node][position] for position in _FACTORS[self.ops[node]]]
        transposed = any(source >= 0 and self.ops[source] == "T" for source in factors)
        return transposed or self.ops[node] not in {"Bmm", "Mm", "Mv"}

    def may_bend(self, nodes: Collection[int], dropouts: int) -> bool:
        """Whether any of these nodes may make the way from input to output non-linear.

        What is not known to be linear may. `dropouts`: as many products with what needs no
        gradient are dropout masks.
        """
        masks = 0
        for node in nodes:
            op, sources = self.ops[node], self.activations(node)
            if op in _FACTORS and len(sources) < 2:  # noqa: PLR2004  (the product of two bends)
                continue
            if op == "Mul" and len(sources) == 1:
                masks += -1 in self.inputs[node]
            elif op not in _LINEAR:
                return True
        return masks > dropouts

    def multiplies_outputs(self) -> bool:
        """Whether, behind the last layers, activations are multiplied with one another."""
        start = 0 if self.output is None else self.output
        region = self.behind([start], self.layers) - self.layers
        return any(
            self.ops[node] in _PRODUCTS and len(self.activations(node)) > 1 for node in region
        )


def flow(run: Run) -> Flow:
    """The graph. Raises UnjudgedError where it was not recorded, or only in part."""
    graph = recorded_graph(run)
    if run.meta["graph"].get("truncated"):
        message = "the autograd graph is too large: only a part of it was recorded"
        raise UnjudgedError(message)
    return Flow(
        ops=tuple(node.op for node in graph.nodes),
        inputs=tuple(node.inputs for node in graph.nodes),
        shapes=tuple(node.shape for node in graph.nodes),
        saved=tuple(node.saved for node in graph.nodes),
        output=graph.output,
    )


def operations_of_the_loss(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is done between the model's output and the loss, and with what settings.

    Everything if the output is unknown, nothing if the graph is.
    """
    try:
        graph = flow(run)
    except UnjudgedError:
        return
    until = set() if graph.output is None else {graph.output}
    for node in sorted(graph.behind([0], until) - until):
        yield graph.ops[node], graph.saved[node]
