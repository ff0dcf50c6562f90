"""The only place where a hook is registered or removed."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradscope.capture.compiled import Inlet, is_traced, run_as_it_is


class Handle(Protocol):
    """What torch returns for a registered hook."""

    def remove(self) -> None:
        """Remove the hook."""


def _inert() -> Callable[..., None]:
    # Takes any arguments, returns None, is pickled by name from the standard library: a model
    # saved while it is watched loads where gradscope isn't installed.
    return contextlib.nullcontext().__exit__


class ModuleHook:
    """A hook on a module, for one owner; copies and pickles of the module hold an inert one.

    Returns None always: any other value would replace the module's input or output. Without an
    inlet nothing of it is compiled.
    """

    __slots__ = ("_inlet", "_target", "owner")

    def __init__(self, owner: object, target: Callable[..., None], inlet: Inlet | None) -> None:
        self.owner = owner
        self._target: Callable[..., None] | None = target
        self._inlet = inlet

    def __call__(self, *args: Any) -> None:
        """Hand on what torch gives a hook."""
        # First of all, so that a compiler that traces through this finds nothing else.
        if torch.compiler.is_compiling():
            if self._inlet is not None and is_traced():
                self._inlet.trace(self._inlet, *args)
            return
        if self._target is not None:
            self._target(*args)

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks for first; a hook that takes anything can't be scripted."""
        message = "torch.jit.script of a watched model: call gradscope's Scope.close() before"
        raise AttributeError(message)

    def release(self) -> None:
        """Do nothing from now on: torch still calls a hook that is removed while others run."""
        self._target = self._inlet = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (contextlib.nullcontext(), "__exit__"))


run_as_it_is(ModuleHook.__call__)


class Hooks:
    """The hooks of one owner, removed together. Removing twice is harmless."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._handles: list[Handle] = []
        self._hooks: list[ModuleHook] = []

    def on_gradient(self, leaf: Tensor, target: Callable[[Tensor], None]) -> None:
        """The same for a leaf, which outlives its graph."""
        self._handles.append(leaf.register_hook(target))

    def before_forward(
        self,
        module: nn.Module,
        target: Callable[[nn.Module, Any, Any], None],
        inlet: Inlet | None = None,
    ) -> None:
        """Call target(module, args, kwargs) before the module's forward."""
        hook = self._made(target, inlet)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after_forward(
        self,
        module: nn.Module,
        target: Callable[[nn.Module, Any, Any, Any], None],
        inlet: Inlet | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Call target(module, args, kwargs, output) after the module's forward.

        always: also after one that raised an Exception (not a KeyboardInterrupt).
        """
        hook = self._made(target, inlet)
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always)
        self._handles.append(handle)

    def _made(self, target: Callable[..., None], inlet: Inlet | None) -> ModuleHook:
        self._hooks.append(ModuleHook(self._owner, target, inlet))
        return self._hooks[-1]

    def around_step(
        self,
        optimizer: Optimizer,
        before: Callable[[Optimizer, Any, Any], Any],
        after: Callable[[Optimizer, Any, Any], None],
    ) -> None:
        """Call before and after each step of the optimizer."""
        for hook in (before, after):
            run_as_it_is(hook)
        self._handles.append(optimizer.register_step_pre_hook(before))
        self._handles.append(optimizer.register_step_post_hook(after))

    def around_any_step(
        self,
        before: Callable[[Optimizer, Any, Any], Any],
        after: Callable[[Optimizer, Any, Any], None],
    ) -> None:
        """Call before and after each step of any optimizer in the process.

        `before` and `after` are bound methods; torch's global list keeps neither alive.
        """
        self.before_any_step(before)
        self._handles.append(register_optimizer_step_post_hook(_weakly(after)))

    def before_any_step(self, target: Callable[[Optimizer, Any, Any], Any]) -> None:
        """Call target before each step of any optimizer in the process; as above."""
        self._handles.append(register_optimizer_step_pre_hook(_weakly(target)))

    def remove(self) -> None:
        """Remove them all."""
        while self._hooks:
            self._hooks.pop().release()
        while self._handles:
            self._handles.pop().remove()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        target = reference()
        return None if target is None else target(*args)

    run_as_it_is(call)
    return call


def on_gradient(output: Tensor, target: Callable[[Tensor], None]) -> None:
    """Call target(gradient) when the gradient arrives at the output; goes with the graph.

    `target` must return None and must not refer to the output: that would leak it.
    """
    output.register_hook(target)


def is_hooked_by_others(module: nn.Module) -> bool:
    """Whether any forward hook of the module is not of this kind: it may replace the output."""
    hooks = module._forward_hooks.values()  # noqa: SLF001  (torch has no public list)
    return not all(isinstance(hook, ModuleHook) for hook in hooks)


def owners(module: nn.Module) -> list[object]:
    """Who has hooks of this kind on the module."""
    hooks = list(module._forward_pre_hooks.values())  # noqa: SLF001  (torch has no public list)
    return [hook.owner for hook in hooks if isinstance(hook, ModuleHook)]
