"""Where along a network the gradient is read: the way that all of it takes, layer by layer.

In a plain stack every layer's pre-activation lies on that way. A residual branch doesn't: its
layers are read where it joins the trunk again. Which operations all paths from the loss to the
first layer go through, the dominators of the autograd graph say (Lengauer & Tarjan 1979).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gradscope.capture.outputs import tensors
from gradscope.comparison.roles import roles_of

# Fewer points than these don't make a line; then all layers are read.
_FEWEST = 4


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """What a weighted layer gave: its name, where it is in the graph, and E h² in float64."""

    name: str
    tensor: Tensor
    node: Node
    number: int
    mean_square: float


@dataclass(frozen=True, eq=False, slots=True)
class Point:
    """Where the gradient is read. joins: whether several branches meet there."""

    name: str
    node: Node
    number: int
    mean_square: float
    joins: bool


class Outputs:
    """The weighted layers' outputs in one forward, in their order."""

    def __init__(self) -> None:
        self.seen: list[Output] = []
        # What entered the last of them.
        self.last_input: Tensor | None = None

    def see(self, name: str, given: Any, output: Any) -> None:
        """A layer's output; of several the first tensor."""
        tensor = next(tensors(output), None)
        if tensor is None or tensor.grad_fn is None:
            return
        entering = next(tensors(given), None)
        self.last_input = None if entering is None else entering.detach()
        square = float(tensor.detach().double().square().mean())
        self.seen.append(Output(name, tensor, tensor.grad_fn, tensor.output_nr, square))


@contextmanager
def seeing_outputs(model: nn.Module) -> Iterator[Outputs]:
    """Inside, forwards of the model tell what its weighted layers give."""
    outputs = Outputs()
    owners = {id(weight.owner) for weight in roles_of(model).weights}
    handles = [
        module.register_forward_hook(_hook(outputs, name or "(root)"))
        for name, module in model.named_modules()
        if id(module) in owners
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _hook(outputs: Outputs, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, given: Any, output: Any) -> None:
        outputs.see(name, given, output)

    return hook


def points(loss: Tensor, outputs: Sequence[Output]) -> list[Point]:
    """From the input to the output, where the gradient of the loss is read."""
    root = loss.grad_fn
    if root is None:
        return []
    graph = _graph(root)
    reached = [output for output in outputs if output.node in graph]
    if not reached:
        return []
    dominators: dict[Node, Node | None] = nx.immediate_dominators(graph, root)
    trunk = _upwards(dominators, reached[0].node)
    place = {node: number for number, node in enumerate(trunk)}
    groups: dict[Node, list[Output]] = {}
    for output in reached:
        joined = next(node for node in _upwards(dominators, output.node) if node in place)
        # What joins in the loss alone has no layer in common with the rest.
        if joined is not root:
            groups.setdefault(joined, []).append(output)
    if len(groups) < _FEWEST and len(reached) > len(groups):
        return [Point(o.name, o.node, o.number, o.mean_square, joins=True) for o in reached]
    return [_point(node, groups[node]) for node in sorted(groups, key=place.__getitem__)]


def _point(node: Node, group: Sequence[Output]) -> Point:
    for output in group:
        if output.node is node:
            return Point(output.name, node, output.number, output.mean_square, joins=False)
    shared = takewhile(_are_equal, zip(*(o.name.split(".") for o in group), strict=False))
    name = ".".join(parts[0] for parts in shared) or group[-1].name
    return Point(name, node, 0, float("nan"), joins=True)


def _are_equal(parts: Sequence[str]) -> bool:
    return len(set(parts)) == 1


def _graph(root: Node) -> "nx.DiGraph[Node]":
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_node(root)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source not in graph:
                waiting.append(source)
            graph.add_edge(node, source)
    return graph


def _upwards(dominators: dict[Node, Node | None], node: Node) -> list[Node]:
    chain = [node]
    while (above := dominators.get(chain[-1])) is not None and above is not chain[-1]:
        chain.append(above)
    return chain


class Gradients:
    """The gradients that arrive at points, read while the backward runs."""

    def __init__(self, read_at: Sequence[Point], samples: int | None) -> None:
        self.logs = [float("nan")] * len(read_at)
        self._samples = samples
        self._handles = [
            point.node.register_prehook(self._hook(number, point.number))
            for number, point in enumerate(read_at)
        ]

    def _hook(self, place: int, number: int) -> Callable[[tuple[Tensor, ...]], None]:
        def hook(gradients: tuple[Tensor, ...]) -> None:
            gradient = gradients[number] if number < len(gradients) else None
            self.logs[place] = (
                float("-inf") if gradient is None else log_norm(gradient, self._samples)
            )

        return hook

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def log_norm(gradient: Tensor, samples: int | None) -> float:
    """The mean over samples of ln of the norm; samples whose gradient is zero are left out.

    -inf where it is zero for all. samples: the batch size, to know the samples' dimension by.
    """
    values = gradient.detach().double()
    rows = values.flatten(1) if samples and values.dim() and len(values) == samples else None
    norms = values.norm().reshape(1) if rows is None else torch.linalg.vector_norm(rows, dim=1)
    kept = norms[norms > 0]
    return float(kept.log().mean()) if len(kept) or norms.isnan().any() else float("-inf")
