"""Which hooks a watch puts where."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.capture.compiled import Inlet, trace_begin, trace_end
from gradscope.capture.hooks import Hooks
from gradscope.capture.observer import Observer


def attach(
    hooks: Hooks,
    observer: Observer,
    model: nn.Module,
    optimizers: Sequence[Optimizer] | None,
    criterion: nn.Module | None,
) -> None:
    """Hook what the observer is to follow from its beginning to its end."""
    if not is_scripted(model):
        begins = partial(_forward_begins, observer.before_forward, model)
        ends = partial(_forward_ends, observer, model)
        hooks.before_forward(
            model, observer.before_forward, Inlet(trace_begin, observer.traced, begins)
        )
        hooks.after_forward(model, observer.after_forward, Inlet(trace_end, observer.traced, ends))
        observer.watch_parts = lambda: _attach_parts(hooks, observer)
    if criterion is not None:
        hooks.after_forward(criterion, observer.after_criterion)
    before, after = observer.before_step, observer.after_step
    if optimizers is None:
        hooks.around_any_step(before, after)
        return
    for optimizer in optimizers:
        observer.optimizers.expect(optimizer)
        hooks.around_step(optimizer, before, after)
    hooks.before_any_step(observer.optimizers.before_any_step)


def _attach_parts(hooks: Hooks, observer: Observer) -> None:
    for part in observer.model.children():
        if not is_scripted(part):
            begins = partial(_forward_begins, observer.before_part, part)
            inlet = Inlet(trace_begin, observer.traced, begins)
            hooks.before_forward(part, observer.before_part, inlet)


def _forward_begins(
    handler: Callable[[nn.Module, Any, Any], None], module: nn.Module, value: Tensor | None
) -> None:
    """Of a forward that a graph tells of, its first input is known."""
    handler(module, (value,), {})


def _forward_ends(
    observer: Observer, module: nn.Module, loss: Tensor | None, output: Tensor | None
) -> None:
    """Of what it returns, the loss and the first tensor."""
    returned = {"loss": None if loss is None else loss.requires_grad_(), "output": output}
    observer.after_forward(module, (), {}, returned)


def is_scripted(model: nn.Module) -> bool:
    """Whether any part is: its forward runs no hooks."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
