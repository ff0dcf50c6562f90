"""The gradient of a bias, beside the sum of what arrived at its layer's output.

The one is the other, ∂L/∂b = Σ ∂L/∂y, unless something was done to it on its way to the optimizer.
Both are known only where every use of the layer in the step was seen. Where one may not have been
there is no number.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture.context import (
    adds_to_gradients,
    is_transformed,
    last_node,
    replayed_node,
)
from gradscope.capture.distributed import processes
from gradscope.capture.entities import Roster
from gradscope.capture.guard import PROBES, Guard
from gradscope.capture.hooks import is_hooked_by_others
from gradscope.capture.precision import has_float64
from gradscope.capture.recorder import Rows
from gradscope.capture.samples import spread
from gradscope.capture.scaling import Deferred, LossScaling, beside, divided
from gradscope.capture.statistics import MOMENTS
from gradscope.capture.uses import Use

# Each is one more read of what arrives at it.
_LAYERS = 8
# Another forward may do more than add the bias.
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FORWARDS = frozenset(kind.forward for kind in (nn.Linear, *_CONVOLUTIONS))
# A sum is known if it is so many times the rounding of its terms.
_CLEAR = 1e3
# Nodes of a forward's graph that are looked at.
_NODES = 10_000
_SUMSQ = MOMENTS.index("sumsq")
_F64 = torch.float64


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer in a step.

    settled: to how many of its uses a gradient came.
    total: what arrived, added up over everything but the units; square: the squares of its entries;
    terms: how many entries each unit's sum has.
    task: the backward that the last came in; adds: whether that adds to the gradient of the bias.
    """

    module: nn.Module
    bias: nn.Parameter
    uses: int = 0
    settled: int = 0
    total: Tensor | None = None
    square: Tensor | None = None
    terms: int = 0
    task: int = -1
    adds: bool = False
    is_unsure: bool = False


class BiasBalance:
    """Adds up what arrives at a few layers, until the optimizer is given their biases."""

    def __init__(self, roster: Roster, guard: Guard, scaling: LossScaling) -> None:
        self._roster = roster
        self._guard = guard
        self._scaling = scaling
        self._chosen: list[tuple[nn.Module, nn.Parameter]] = []
        # Of this step; those whose bias was read are no longer among them.
        self._layers: dict[nn.Module, _Layer] = {}
        # Whether it is known which of them are used in another way than as a module.
        self._is_checked = False
        # The node that was last when an optimizer's step ended.
        self._last = last_node()

    def choose(self, names: Mapping[nn.Module, str]) -> None:
        """Layers all over the depth whose bias is a parameter of their own."""
        held = Counter(
            id(parameter)
            for module in self._roster.model.modules()
            for parameter in module._parameters.values()  # noqa: SLF001  (parameters() hides twins)
            if parameter is not None
        )
        found = [
            (module, bias)
            for module in names
            if (bias := _bias(module)) is not None and held[id(bias)] == 1
        ]
        self._chosen = spread(found, _LAYERS)
        self._is_checked = False

    def begin(self) -> None:
        """A step is recorded."""
        # The gradients of several processes are averaged.
        alone = processes() is None
        self._layers = {module: _Layer(module, bias) for module, bias in self._chosen if alone}
        # What was computed since then may be a part of the step that had no hooks.
        if self._last != last_node():
            self.unsure()

    def step_ended(self) -> None:
        """An optimizer's step has ended."""
        self._last = last_node()

    def unsure(self, module: nn.Module | None = None) -> None:
        """The layer, or any of them, may have uses in this step that are not seen."""
        for layer in self._layers.values():
            layer.is_unsure |= module is None or layer.module is module

    def used(self, module: nn.Module) -> None:
        """The module has run, with gradients."""
        layer = self._layers.get(module)
        if layer is not None:
            layer.uses += 1
            # A call with other weights has them in the place of the module's own.
            layer.is_unsure |= _bias(module) is not layer.bias or is_hooked_by_others(module)

    def model_returned(self, output: Tensor) -> None:
        """The first time, leave out what the forward used more often than as a module."""
        if not self._is_checked and self._layers:
            self._is_checked = True
            self._guard.run(PROBES, self._check, output)

    def _check(self, output: Tensor) -> None:
        edges = _edges(output, {id(layer.bias) for layer in self._layers.values()})
        for module, layer in list(self._layers.items()):
            if edges[id(layer.bias)] > layer.uses:
                self._chosen = [entry for entry in self._chosen if entry[0] is not module]
                del self._layers[module]

    def repeated(self, module: nn.Module) -> None:
        """The module runs in a replay, or in a transform: where that leads is not followed."""
        # What is repeated for torch's own nodes leads nowhere else than what was seen.
        if module in self._layers and (is_transformed() or replayed_node() is not None):
            self.unsure(module)

    def missed(self, use: Use | None) -> None:
        """A gradient came to a use in a step that is over."""
        if use is not None:
            self.unsure(use.sequence.module)

    def arrived(
        self, use: Use | None, gradient: Tensor, moments: Tensor | None, *, is_first: bool
    ) -> None:
        """A gradient came to one use of a module; `is_first`: the first one to this use.

        moments: those of the gradient, of the loss as it was before scaling; None: not known.
        """
        layer = None if use is None else self._layers.get(use.sequence.module)
        if layer is not None:
            layer.settled += is_first
            self._guard.run(PROBES, self._add, layer, gradient, moments)

    @torch.no_grad()
    def _add(self, layer: _Layer, gradient: Tensor, moments: Tensor | None) -> None:
        if moments is None or type(gradient) is not Tensor or gradient.is_sparse:
            layer.is_unsure = True
            return
        task = torch._C._current_graph_task_id()  # noqa: SLF001  (no public name)
        if layer.task != task:
            layer.task, layer.adds = task, adds_to_gradients([layer.bias])
            if layer.adds:
                _leave_out_cleared(layer)
        if not layer.adds:
            return
        others = [dim for dim in range(gradient.dim()) if dim != _unit_dim(layer.module, gradient)]
        wide = _F64 if gradient.dtype == _F64 else torch.float32
        total = gradient.sum(others, dtype=wide) if others else gradient
        total, square = total.to(_F64), moments[_SUMSQ]
        if (scale := self._scaling.scale) is not None:
            total = divided(total, scale)
        layer.total = total if layer.total is None else layer.total + total
        layer.square = square if layer.square is None else layer.square + square
        layer.terms += gradient.numel() // max(len(total), 1)

    def read(self, rows: Rows, parameters: Iterable[Tensor], left: Deferred) -> None:
        """An optimizer is given these parameters; `left` is what it does to their gradients."""
        given = {id(parameter) for parameter in parameters}
        for layer in [layer for layer in self._layers.values() if id(layer.bias) in given]:
            # Once: of another step's gradients within this one, the sum is not known.
            del self._layers[layer.module]
            if not self._scaling.is_unknown:
                self._guard.run(PROBES, self._read, rows, layer, left)

    @torch.no_grad()
    def _read(self, rows: Rows, layer: _Layer, left: Deferred) -> None:
        gradient, total, square = layer.bias.grad, layer.total, layer.square
        if layer.is_unsure or layer.settled != layer.uses or total is None or square is None:
            return
        known = self._roster.parameters.get(id(layer.bias))
        if gradient is None or type(gradient) is not Tensor or known is None:
            return
        wide = gradient.to(_F64)
        if left.scale is not None:
            wide = divided(wide, left.scale)
        # Those of narrower formats are added up in single precision.
        added = layer.bias.dtype if layer.bias.dtype == _F64 else torch.float32
        rounding = _CLEAR * torch.finfo(added).eps
        least = square * (rounding**2 * layer.terms)
        numbers = torch.stack([wide.dot(total), wide.dot(wide), total.dot(total), least])
        if left.overflow is not None:
            numbers = numbers.masked_fill(beside(left.overflow, numbers), torch.nan)
        rows.add("balance", known[0], numbers)


def _edges(output: Tensor, biases: set[int]) -> Counter[int]:
    """How often each of the biases, by identity, is an argument in the graph of the output."""
    found: Counter[int] = Counter()
    waiting: list[Any] = [] if output.grad_fn is None else [output.grad_fn]
    seen = set(waiting)
    while waiting and len(seen) < _NODES:
        for node, _ in waiting.pop().next_functions:
            leaf = id(getattr(node, "variable", None))
            if leaf in biases:
                found[leaf] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return found


def _leave_out_cleared(layer: _Layer) -> None:
    """Another backward begins: what came before counts unless the gradient was cleared since."""
    if layer.total is None or layer.square is None:
        return
    gradient = layer.bias.grad
    if gradient is None:
        layer.total, layer.square, layer.terms = None, None, 0
    else:
        kept = (gradient != 0).any()
        layer.total = torch.where(kept, layer.total, 0.0)
        layer.square = torch.where(kept, layer.square, 0.0)


def _bias(module: nn.Module) -> nn.Parameter | None:
    """The bias of a layer that does nothing else to it than add it."""
    if type(module).forward not in _FORWARDS or "forward" in vars(module):
        return None
    # What is parametrized is computed from another, and no parameter.
    bias = module._parameters.get("bias")  # noqa: SLF001  (getattr would compute it)
    if type(bias) is not nn.Parameter or not bias.requires_grad or not bias.is_floating_point():
        return None
    return bias if has_float64(bias.device) else None


def _unit_dim(module: nn.Module, gradient: Tensor) -> int:
    if isinstance(module, _CONVOLUTIONS):
        # Without a batch's dimension the units are the first.
        return 1 if gradient.dim() == len(module.kernel_size) + 2 else 0
    return gradient.dim() - 1
