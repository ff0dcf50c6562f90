"""What becomes of an activation's output on its way to the loss, read from the autograd graph."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from gradscope.capture.graph import operation

# An output of a node: the node, and which of its outputs.
Edge = tuple[Node, int]

_WEIGHTED = re.compile(r"(mm|mv|bmm|linear|conv\w*|\w*convolution\w*|\w*(rnn|lstm|gru)\w*)$")
# What it repeats is not in the graph; hardly anyone checkpoints a part without weights.
_OPAQUE = "checkpointfunction"
_SHAPE = re.compile(
    r"(view|reshape|unsafeview|reshapealias|alias|asstrided|expand|unsqueeze|squeeze|permute"
    r"|transpose|t|slice|select|(unsafe)?split|splitwithsizes|unbind|cat|stack|clone|copy|copyslices"
    r"|tocopy|neg|mean)$"
)
_SUM = re.compile(r"(add|sub|rsub)$")
_ELEMENTWISE = re.compile(r"(add|sub|rsub|mul|div|pow|neg|softplus|exp|log1p|clone|tocopy)$")
_CHANNELS_FIRST = re.compile(r"(conv|batchnorm|groupnorm|instancenorm|pool|upsample)")
_CHANNELS_LAST = re.compile(r"(mm|mv|linear|layernorm|rmsnorm|embedding)")
# How far is looked back for what a weight, or an activation that is written out, is made of.
_MOST_NODES = 64


def kind(node: Node) -> str:
    """The operation, in lower case, without "Backward" and its number."""
    name = operation(node).lower()
    head, _, _ = name.partition("backward")
    return head.strip("_")


class Dataflow:
    """The graph of a loss.

    parameters: by identity. outputs: the nodes that made the outputs of activations.
    """

    def __init__(self, root: Node, parameters: Collection[int], outputs: Collection[Node]) -> None:
        self._parameters = parameters
        self._outputs = outputs
        self.nodes = [root]
        self._consumers: dict[Node, list[tuple[Node, int]]] = {root: []}
        for node in self.nodes:  # It grows while it is gone through.
            for index, (source, _) in enumerate(node.next_functions):
                if source is None:
                    continue
                if source not in self._consumers:
                    self._consumers[source] = []
                    self.nodes.append(source)
                self._consumers[source].append((node, index))
        self._before_weights = self._reached([n for n in self.nodes if self._is_weighted(n)])

    def __contains__(self, node: Node) -> bool:
        """Whether the loss depends on it."""
        return node in self._consumers

    def is_before_weights(self, node: Node) -> bool:
        """Whether a layer with weights follows on a way to the loss."""
        return node in self._before_weights

    def _reached(self, starts: list[Node]) -> set[Node]:
        reached: set[Node] = set()
        waiting = [source for node in starts for source, _ in _sources(node)]
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += [source for source, _ in _sources(node)]
        return reached

    def _is_weighted(self, node: Node) -> bool:
        name = kind(node)
        if name.startswith(_OPAQUE):
            return True
        return _WEIGHTED.search(name) is not None and any(
            self._largest_parameter(source, may_compute=True) >= 2  # noqa: PLR2004  (a matrix)
            for source, _ in _sources(node)
        )

    def _largest_parameter(self, start: Node, *, may_compute: bool = False) -> int:
        """The most dimensions of the parameters that it is made of; 0: also of other things.

        may_compute: also by matrix products with constants, as an orthogonal parametrization
        does. A layer that the model's input enters looks the same.
        """
        dimensions, seen, waiting = 0, {start}, [start]
        while waiting:
            node = waiting.pop()
            variable: Any = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._parameters:
                dimensions = max(dimensions, variable.dim())
            elif node in self._outputs or not node.next_functions or len(seen) > _MOST_NODES:
                return 0
            if not may_compute and _has_data(node):
                return 0
            new = [source for source, _ in _sources(node) if source not in seen]
            seen.update(new)
            waiting += new
        return dimensions

    def use(self, output: Node, given: Edge | None, products: Collection[Node]) -> str | None:
        """How the output is used other than as a hidden activation's; None: not in such a way.

        given: what made the activation's input. products: nodes that multiply by other data.
        """
        for node, index in self._users(output, products):
            name = kind(node)
            if "softmax" in name:
                return "it bounds what a softmax is given"
            others = [
                (source, number)
                for at, (source, number) in enumerate(node.next_functions)
                if at != index and source is not None
            ]
            if given is not None and any(_origins(edge) & _origins(given) for edge in others):
                return "a part of an activation that is written out"
            return "a gate: its output is a factor"
        return None

    def _users(self, output: Node, products: Collection[Node]) -> Iterator[tuple[Node, int]]:
        """Nodes that use it as a factor or in a softmax, beyond what only shapes or scales it."""
        waiting, seen = [output], {output}
        while waiting:
            source = waiting.pop()
            for node, index in self._consumers.get(source, []):
                others = [s for at, (s, _) in enumerate(node.next_functions) if at != index and s]
                if "softmax" in kind(node) or self._multiplies(node, source, others, products):
                    yield node, index
                elif node not in seen and _passes_on(kind(node), index, others):
                    seen.add(node)
                    waiting.append(node)

    def _multiplies(
        self, node: Node, source: Node, others: list[Node], products: Collection[Node]
    ) -> bool:
        """Whether it takes the source as a factor of other data, not of a number or a parameter."""
        name = kind(node)
        if name == "mul":
            is_factor = any(other is not source and not self._is_scale(other) for other in others)
            return is_factor or (not others and node in products)
        if name == "bmm" and others:
            return not self._largest_parameter(others[0])
        return name in {"addcmul", "lerp"} and bool(others)

    def _is_scale(self, node: Node | None) -> bool:
        """Whether it is a parameter, but for its shape."""
        while node is not None and node.next_functions and _SHAPE.match(kind(node)):
            node = node.next_functions[0][0]
        return id(getattr(node, "variable", None)) in self._parameters

    def follows(self, given: Edge | None) -> Node | None:
        """The activation's output from which a plain chain of layers leads to this input."""
        has_weights = False
        node = None if given is None else given[0]
        while node is not None:
            if node in self._outputs:
                return node if has_weights and self._goes_on(node) else None
            if not self._goes_on(node):
                return None
            has_weights |= self._is_weighted(node)
            data = [s for s, _ in _sources(node) if not self._largest_parameter(s)]
            node = data[0] if len(data) == 1 else None
        return None

    def _goes_on(self, node: Node) -> bool:
        """Whether a single node uses it."""
        return len(self._consumers.get(node, [])) <= 1


def _passes_on(name: str, index: int, others: list[Node]) -> bool:
    """Whether what it returns is its input, but for shape, scale and offset."""
    if _SUM.match(name):
        return not others
    return _SHAPE.match(name) is not None or name == "mul" or (name == "div" and index == 0)


def _has_data(node: Node) -> bool:
    """Whether data enters here: it needs no gradient, and so has no node of its own."""
    name = kind(node)
    if name.startswith("embedding"):
        return True
    # A weight under spectral_norm is multiplied by a vector that is no parameter.
    is_layer = _WEIGHTED.search(name) is not None and name != "mv"
    return is_layer and any(source is None for source, _ in node.next_functions)


def _sources(node: Node) -> list[Edge]:
    return [(source, number) for source, number in node.next_functions if source is not None]


def _origins(edge: Edge) -> set[Edge]:
    """What it was computed from entry by entry, itself included."""
    found, waiting = {edge}, [edge]
    while waiting and len(found) < _MOST_NODES:
        node, _ = waiting.pop()
        if _ELEMENTWISE.match(kind(node)):
            # A parameter may be a part of much that has nothing else in common.
            new = [edge for edge in _sources(node) if not hasattr(edge[0], "variable")]
            waiting += [edge for edge in new if edge not in found]
            found.update(new)
    return found


def edge_of(tensor: Tensor) -> Edge | None:
    """What made it, as long as it is not changed in place."""
    node = tensor.grad_fn
    return None if node is None else (node, tensor.output_nr)


def unit_dimension(given: Edge | None, dimensions: int) -> int:
    """The dimension of the units of what was given: 1 behind convolutions, else the last, -1."""
    moves: list[list[int]] = []
    node = None if given is None else given[0]
    # Without a graph: of so many dimensions only images and volumes are.
    unit = 1 if given is None and dimensions >= 4 else dimensions - 1  # noqa: PLR2004
    while node is not None:
        name = kind(node)
        if _CHANNELS_FIRST.search(name):
            unit = 1
            break
        if _CHANNELS_LAST.search(name):
            break
        moves += _moved(node, name, dimensions)
        node = next((source for source, _ in _sources(node)), None)
    for order in reversed(moves):
        unit = order.index(unit) if unit in order else unit
    return -1 if unit >= dimensions - 1 else unit


def _moved(node: Any, name: str, dimensions: int) -> list[list[int]]:
    """Where each dimension was before it."""
    order = list(range(dimensions))
    if name == "permute":
        order = [_signed(place) % dimensions for place in node._saved_dims]  # noqa: SLF001
    elif name == "transpose":
        first, second = (
            _signed(place) % dimensions
            for place in (node._saved_dim0, node._saved_dim1)  # noqa: SLF001
        )
        order[first], order[second] = order[second], order[first]
    else:
        return []
    return [order]


def _signed(number: int) -> int:
    """Autograd keeps negative numbers as unsigned ones."""
    return number - 2**64 if number >= 2**63 else number


def parameter_identities(model: nn.Module) -> frozenset[int]:
    """Of all its parameters."""
    return frozenset(map(id, model.parameters()))
