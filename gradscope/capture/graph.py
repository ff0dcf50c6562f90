"""The autograd graph of one step: by which operations the loss depends on the parameters."""

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gradscope.capture.entities import Roster
from gradscope.capture.names import owned_parameters

# Breadth-first from the loss: what is left out of a larger graph is its far end.
_MOST_NODES = 4_000
# Of a list of sizes or dimensions; a longer one is of data.
_MOST_NUMBERS = 16
# Autograd keeps negative numbers as unsigned ones.
_WRAPPED, _UNSIGNED = 2**63, 2**64
# Of the forwards of a step so many are remembered: a step may go on without end.
_MOST_OUTPUTS = 16

# A node by its number in the order of creation, which is of one thread, and its operation: holding
# the node would hold the graph.
_Origin = tuple[int, str]


class GraphTaker:
    """Takes the graph of the first loss that is seen, once in a run.

    Until there is a loss, that of the first output: where none is ever seen it has to do.

    write: told of a graph, once or twice; the later one counts.
    """

    def __init__(self, roster: Roster, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._roster = roster
        self._write = write
        self._step = -1
        self._outputs: deque[_Origin] = deque(maxlen=_MOST_OUTPUTS)
        # The graph of an output, while its step is open; whether one was seen.
        self._found: dict[str, Any] | None = None
        self._has_output = False
        self.is_done = False

    def see_output(self, step: int, output: Tensor | None, loss: Tensor | None) -> None:
        """The model's forward has ended in a recorded step."""
        if self.is_done:
            return
        if step != self._step:
            self._step = step
            self._outputs.clear()
        node = None if output is None else output.grad_fn
        if node is not None:
            self._outputs.append(_origin(node))
        if loss is not None:
            self.see_loss(step, loss)
        if node is not None and not self.is_done and not self._has_output:
            self._has_output = True
            self._found = self._taken("output", step, node)

    def see_loss(self, step: int, loss: Tensor) -> None:
        """A loss, before its backward or after, of a recorded step that is open or has closed."""
        if not self.is_done and loss.grad_fn is not None:
            self.is_done, self._found = True, None
            self._write(self._taken("loss", step, loss.grad_fn))
            self._outputs.clear()

    def step_closed(self) -> None:
        """No loss has come in this step."""
        if self._found is not None:
            self._write(self._found)
            self._found = None

    def _taken(self, root: str, step: int, node: Node) -> dict[str, Any]:
        names = {id(p): name for name, _, p in owned_parameters(self._roster.model)}
        return {"step": step, "root": root, **walked(node, names, self._outputs)}


def _origin(node: Node) -> _Origin:
    return node._sequence_nr(), operation(node)  # noqa: SLF001  (no public way)


def operation(node: Node) -> str:
    """The name that torch gives it, without its namespace."""
    return node.name().rpartition("::")[2]


def walked(
    root: Node, parameters: Mapping[int, str], outputs: Collection[_Origin]
) -> dict[str, Any]:
    """The nodes from the root on, breadth-first, as plain numbers and names.

    parameters: names by the identity of the tensor.
    outputs: of the nodes that made the model's output; the first that is met counts.

    Nothing is computed, no saved tensor is unpacked: after the backward the nodes are still there.
    An argument that needs no gradient is -1, as is one beyond the last node of a truncated graph.
    """
    order, places = [root], {root: 0}
    truncated = False
    nodes: list[dict[str, Any]] = []
    output = None
    plain: dict[type, tuple[tuple[str, str], ...]] = {}
    # It grows while it is gone through.
    for node in order:
        inputs = []
        for argument, _ in node.next_functions:
            if argument is not None and argument not in places:
                if len(order) < _MOST_NODES:
                    places[argument] = len(order)
                    order.append(argument)
                else:
                    truncated = True
            inputs.append(-1 if argument is None else places.get(argument, -1))
        kind = type(node)
        if kind not in plain:
            plain[kind] = _plain_names(kind)
        if output is None and outputs and _origin(node) in outputs:
            output = len(nodes)
        nodes.append(_described(node, inputs, plain[kind], parameters))
    return {"nodes": nodes, "output": output, "truncated": truncated}


def _described(
    node: Node,
    inputs: list[int],
    plain: tuple[tuple[str, str], ...],
    parameters: Mapping[int, str],
) -> dict[str, Any]:
    saved = {}
    for name, attribute in plain:
        value = _as_json(getattr(node, attribute))
        if value is not None:
            saved[name] = value
    found = {"op": operation(node), "inputs": inputs, "shapes": _shapes(node), "saved": saved}
    parameter = parameters.get(id(getattr(node, "variable", None)))
    return found if parameter is None else {**found, "parameter": parameter}


def _plain_names(kind: type) -> tuple[tuple[str, str], ...]:
    """What nodes of this class have saved that is no tensor: as they say it, and the attribute.

    Whatever holds a tensor can also be had packed, under a name of its own: that tells it apart
    without asking for it. The class of a custom function is its author's.
    """
    if issubclass(kind, BackwardCFunction):
        return ()
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(
        (name.removeprefix("_saved_"), name)
        for name in names
        # Of how a tensor lies in memory nothing depends.
        if not hasattr(kind, f"_raw{name}") and not name.endswith("strides")
    )


def _as_json(value: object) -> object:
    """Numbers, words, and short lists of whole numbers; None for anything else."""
    if isinstance(value, (tuple, list)):
        # A symbolic size is none of these.
        if len(value) <= _MOST_NUMBERS and all(type(entry) in (bool, int) for entry in value):
            return [_as_json(entry) for entry in value]
        return None
    if type(value) is int:
        return value - _UNSIGNED if value >= _WRAPPED else value
    if type(value) is float:
        # JSON has no infinity.
        return value if math.isfinite(value) else str(value)
    return value if type(value) in (bool, str) else None


def _shapes(node: Node) -> list[list[int] | None]:
    """Of what the node's forward returned; None: nothing, or a tensor without one shape."""
    return [_shape(metadata) for metadata in getattr(node, "_input_metadata", ())]


def _shape(metadata: Any) -> list[int] | None:
    if metadata is None or metadata.is_nested_tensor:
        return None
    shape = list(metadata.shape)
    return shape if all(type(size) is int for size in shape) else None
