"""Where residual branches end: the last weight before a branch is added to its skip.

Read from the autograd graph of one forward, so that it doesn't matter how the addition is written
and whose model it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradscope.capture.entities import module_group
from gradscope.capture.names import named_modules
from gradscope.comparison.assignment import underlying

Node: TypeAlias = Any  # torch.autograd.graph.Node, whose concrete types have no names.

# What hands values on, moved or scaled: zero before it is zero behind it, and its gradient is not
# zero because of that (behind a ReLU whose input is zero it would be, for ever).
_CARRIERS = (
    "Alias", "AsStrided", "AvgPool", "Clone", "Div", "Expand", "Mean", "Mul", "NativeDropout",
    "Permute", "Reshape", "Select", "Slice", "Squeeze", "ToCopy", "Transpose", "TBackward",
    "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip
_MULTIPLYING = ("Addmm", "Mm", "Bmm", "Convolution", "Linear", "MkldnnConvolution")
_NORMALIZING = ("NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm",
                "FusedRmsNorm", "MiopenBatchNorm")  # fmt: skip
# A weight may pass through these before it is used.
_ON_WEIGHTS = ("AccumulateGrad", "TBackward", "Transpose", "Permute", "View", "ToCopy", "Slice",
               "WeightNorm", "Alias", "Split", "Unsqueeze", "Squeeze", "Expand")  # fmt: skip


@dataclass(frozen=True, slots=True)
class End:
    """A parameter that makes a branch zero when it is, with the module that holds it."""

    name: str
    owner: nn.Module
    attribute: str


def branch_ends(model: nn.Module, forward: Callable[[], object]) -> tuple[End, ...]:
    """The last norm's scale, or the last weight, of each residual branch that `forward` runs.

    Empty where the graph behind what it returns shows none. A branch that ends in a nonlinearity
    is left out: from zero it might never learn.
    """
    hook = model.register_forward_pre_hook(_with_graph, with_kwargs=True)
    try:
        with torch.enable_grad():
            output = forward()
    finally:
        hook.remove()
    holders = _holders(model)
    graph = _Graph(holders)
    found = {end for node in _nodes(output) if _is(node, ("Add",)) for end in graph.ends_at(node)}
    return tuple(end for end in dict.fromkeys(holders.values()) if end in found)


def _with_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first block's skip is the batch itself, which would have no node."""
    del model

    def with_node(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            # A clone: a model may change its input in place, which no leaf allows.
            return value.detach().requires_grad_().clone()
        return value

    made: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(with_node, (args, kwargs))
    return made


def _holders(model: nn.Module) -> dict[int, End]:
    held: dict[int, End] = {}
    for name, module in named_modules(model):
        group = module_group(module)
        if group not in {"linear", "convolution", "norm", "attention"}:
            continue
        for parameter in underlying(module, "weight"):
            full = f"{name}.weight" if name else "weight"
            held.setdefault(id(parameter), End(full, module, "weight"))
    return held


def _is(node: Node, kinds: tuple[str, ...]) -> bool:
    name: str = node.name().rpartition("::")[2]
    return name.startswith(kinds)


def _parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _nodes(output: object) -> Iterator[Node]:
    waiting = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = [parent for parent in _parents(node) if parent not in seen]
        seen.update(new)
        waiting += new


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)


class _Graph:
    """What of the graph is asked for more than once."""

    def __init__(self, holders: dict[int, End]) -> None:
        self.holders = holders
        self._parameters: dict[Node, bool] = {}

    def ends_at(self, addition: Node) -> list[End]:
        """Of the two that are added here, the branch's end; empty where this is no residual sum."""
        sides = self._inputs(addition)
        if len(sides) != 2:  # noqa: PLR2004
            return []
        for skip, branch in (sides, sides[::-1]):
            if self._starts_both(skip, branch):
                return self._ends(branch)
        return []

    def _starts_both(self, skip: Node, branch: Node) -> bool:
        """Whether `skip` is a way, with at most one weight and one norm, round `branch`."""
        way = list(self._linear_way(skip))
        other = set(self._linear_way(branch))
        for node in way:
            # Two ways without a nonlinearity are two parts of one layer.
            if node in other:
                return skip is node and branch is not node
            if _reaches(branch, node):
                return True
        return False

    def _linear_way(self, node: Node) -> Iterator[Node]:
        weights = norms = 0
        while True:
            yield node
            inputs = self._inputs(node)
            weights += _is(node, _MULTIPLYING)
            norms += _is(node, _NORMALIZING)
            passes = _is(node, (*_CARRIERS, *_MULTIPLYING, *_NORMALIZING))
            if not passes or len(inputs) != 1 or weights > 1 or norms > 1:
                return
            node = inputs[0]

    def _ends(self, node: Node) -> list[End]:
        while True:
            inputs = self._inputs(node)
            if _is(node, (*_MULTIPLYING, *_NORMALIZING)):
                held = [self.holders.get(id(p)) for p in self._weights_of(node)]
                return [end for end in held if end is not None]
            if _is(node, ("Add",)) and len(inputs) == 2:  # noqa: PLR2004
                return [end for side in inputs for end in self._ends(side)]
            if not _is(node, (*_CARRIERS, "Add")) or len(inputs) != 1:
                return []
            node = inputs[0]

    def _inputs(self, node: Node) -> list[Node]:
        """What the node computes from, parameters left out."""
        return [parent for parent in _parents(node) if not self._is_parameter(parent)]

    def _is_parameter(self, node: Node) -> bool:
        known = self._parameters.get(node)
        if known is None:
            parents = node.next_functions
            known = _is(node, _ON_WEIGHTS) and all(
                parent is not None and self._is_parameter(parent) for parent, _ in parents
            )
            if _is(node, ("AccumulateGrad",)):
                # An input that requires grad is a leaf, too.
                known = isinstance(node.variable, nn.Parameter)
            self._parameters[node] = known
        return known

    def _weights_of(self, node: Node) -> Iterator[Tensor]:
        for parent in _parents(node):
            if self._is_parameter(parent):
                yield from (n.variable for n in _cone(parent) if _is(n, ("AccumulateGrad",)))


def _cone(node: Node) -> Iterator[Node]:
    yield node
    for parent in _parents(node):
        yield from _cone(parent)


def _reaches(start: Node, wanted: Node) -> bool:
    """Whether `wanted` is among what `start` was computed from."""
    # Numbered as they are made: what is older than the wanted one does not come from it.
    oldest = wanted._sequence_nr()  # noqa: SLF001
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if node is wanted:
            return start is not wanted
        for parent in _parents(node):
            if parent not in seen and parent._sequence_nr() >= oldest:  # noqa: SLF001
                seen.add(parent)
                waiting.append(parent)
    return False
