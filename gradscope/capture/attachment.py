"""Which hooks a watch puts where."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

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
    # The forward of a module that was compiled in place runs no hooks but compiled ones;
    # around torch.compile(model) they run as they are.
    if not _compiled_in_place(model):
        hooks.before_forward(model, observer.before_forward)
        hooks.after_forward(model, observer.after_forward)
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
        if not is_compiled(part):
            hooks.before_forward(part, observer.before_part)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part is."""
    # By name: importing torch._dynamo to ask takes a second.
    return any(
        type(module).__name__ == "OptimizedModule" or _compiled_in_place(module)
        for module in model.modules()
    )


def _compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(
        module, torch.jit.ScriptModule
    )
