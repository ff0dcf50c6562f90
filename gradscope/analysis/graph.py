"""The autograd graph of the loss, as far as it was recorded: its nodes, and its head."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradscope.analysis.once import once
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run

Shape = tuple[int, ...]

# What hands its entries on as they are, in another order, shape or dtype.
VIEWS = frozenset(
    {
        "Alias",
        "Clone",
        "Contiguous",
        "Permute",
        "ReshapeAlias",
        "Reshape",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    }
)
# Sums of products with weights or with other activations: where the model's last layer begins.
# What is compiled, or the user's own, is as opaque.
LAYERS = frozenset(
    {
        "Addbmm",
        "Addmm",
        "Addmv",
        "Baddbmm",
        "Bmm",
        "Cdist",
        "Convolution",
        "CudnnConvolution",
        "CudnnRnn",
        "Dot",
        "Embedding",
        "EmbeddingBag",
        "Linear",
        "MkldnnConvolution",
        "MkldnnLinear",
        "MkldnnRnnLayer",
        "Mm",
        "Mv",
        "Trilinear",
    }
)
PARAMETER = "AccumulateGrad"
# The loss functions that autograd knows: of classes, of two of them, and of numbers.
LIKELIHOODS = ("NllLoss", "NllLoss2D")
BINARY = ("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")
REGRESSIONS = ("MseLoss", "SmoothL1Loss", "HuberLoss", "L1Loss")

_SUFFIX = re.compile(r"Backward\d*$")
# Autograd keeps signed numbers, but shows some of them as unsigned: a dim of -1 as 2⁶⁴ - 1.
_SIGNED = 1 << 63


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of the forward: `op` is its name in autograd without `Backward0`.

    `inputs` are indices of nodes (-1: an argument that needs no gradient). `shape` is that of
    what it returned; None where it returned several, of several shapes.
    """

    op: str
    inputs: tuple[int, ...] = ()
    shape: Shape | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """How many entries it returned; 0 where that is not known."""
        if self.shape is None:
            return 0
        entries = 1
        for size in self.shape:
            entries *= size
        return entries

    def number(self, name: str) -> int | None:
        """A whole number that autograd saved; None without."""
        value = self.saved.get(name)
        if not isinstance(value, int):
            return None
        return value - (1 << 64) if value >= _SIGNED else value

    @property
    def dim(self) -> int | None:
        """The one dimension along which it works, counted from 0; None where not known."""
        dim, ranks = self.number("dim"), len(self.shape or ())
        if dim is None or not -ranks <= dim < ranks:
            return None
        return dim % ranks


@dataclass(frozen=True, eq=False)
class Graph:
    """Node 0 is the root; `output` is the node that made the model's output, if it is known."""

    nodes: tuple[Node, ...]
    output: int | None

    @cached_property
    def head(self) -> tuple[int, ...]:
        """From the loss to the model's last layers, nearest first.

        These layers are the last of each way; what comes before them is not in it.
        """
        found = [0]
        seen = {0}
        for index in found:
            if self.nodes[index].op in LAYERS:
                continue
            new = [at for at in self.nodes[index].inputs if at >= 0 and at not in seen]
            seen.update(new)
            found.extend(dict.fromkeys(new))
        return tuple(found)

    def way(self, index: int) -> Iterator[int]:
        """The node, and through views those that its entries come from, to the one that made them.

        A node with several differentiable arguments made its entries itself.
        """
        seen: set[int] = set()
        while index >= 0 and index not in seen:
            seen.add(index)
            yield index
            inputs = [at for at in self.nodes[index].inputs if at >= 0]
            if self.nodes[index].op not in VIEWS or len(inputs) != 1:
                return
            index = inputs[0]

    def maker(self, index: int) -> int:
        """The node that made these entries; -1 where they need no gradient."""
        at = -1
        for passed in self.way(index):
            at = passed
        return at

    def find(self, *ops: str) -> Iterator[int]:
        """The nodes of the head that are such operations, nearest to the loss first."""
        return (index for index in self.head if self.nodes[index].op in ops)

    @cached_property
    def consumers(self) -> Mapping[int, tuple[int, ...]]:
        """Per node of the head: those of the head that it is an argument of."""
        found: dict[int, list[int]] = {index: [] for index in self.head}
        for index in self.head:
            if self.nodes[index].op in LAYERS:
                continue
            for at in self.nodes[index].inputs:
                if at in found:
                    found[at].append(index)
        return {index: tuple(dict.fromkeys(above)) for index, above in found.items()}

    def above(self, index: int) -> frozenset[int]:
        """The node of the head and all that is made of it, up to the loss."""
        found = {index: None}
        queue = [index]
        for at in queue:
            new = [above for above in self.consumers.get(at, ()) if above not in found]
            found.update(dict.fromkeys(new))
            queue += new
        return frozenset(found)


def loss_graph(run: Run) -> Graph:
    """The graph of the first recorded step's loss. Raises UnjudgedError where there is none."""
    given = run.meta.get("graph")
    if not isinstance(given, Mapping) or given.get("root", "loss") != "loss":
        message = "the autograd graph of the loss was not recorded"
        raise UnjudgedError(message)
    return recorded_graph(run)


@once
def recorded_graph(run: Run) -> Graph:
    """The graph of the first recorded step, of its loss or else of an output.

    What is odd in it is left out: rules then see less, not wrong. Raises UnjudgedError where there
    is none.
    """
    given = run.meta.get("graph")
    if not isinstance(given, Mapping):
        message = "the autograd graph was not recorded"
        raise UnjudgedError(message)
    listed = given.get("nodes")
    nodes = listed if isinstance(listed, list | tuple) else ()
    if not nodes:
        message = "the recorded autograd graph is empty"
        raise UnjudgedError(message)
    output = given.get("output")
    known = isinstance(output, int) and 0 <= output < len(nodes)
    return Graph(tuple(_node(node, len(nodes)) for node in nodes), output if known else None)


def _node(given: object, amount: int) -> Node:
    if not isinstance(given, Mapping):
        return Node("")
    op = _SUFFIX.sub("", str(given.get("op", "")).rpartition("::")[2])
    inputs = tuple(
        at if isinstance(at, int) and 0 <= at < amount else -1 for at in _list(given.get("inputs"))
    )
    shapes = {_shape(shape) for shape in _list(given.get("shapes"))}
    saved = given.get("saved")
    return Node(
        op,
        inputs,
        shapes.pop() if len(shapes) == 1 else None,
        saved if isinstance(saved, Mapping) else {},
    )


def _shape(given: object) -> Shape | None:
    sizes = _list(given)
    whole = isinstance(given, list | tuple) and all(isinstance(size, int) for size in sizes)
    return tuple(sizes) if whole else None


def _list(given: object) -> list[Any] | tuple[Any, ...]:
    return given if isinstance(given, list | tuple) else ()
