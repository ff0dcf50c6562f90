"""The calls of activations in a model: as modules, as functions and as methods of tensors."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradscope.capture import names
from gradscope.capture.context import is_inside_compiled
from gradscope.capture.entities import ROOT
from gradscope.capture.hooks import Hooks
from gradscope.comparison.recognition import ELEMENTWISE, variant
from gradscope.comparison.replays import Replays, is_replay
from gradscope.errors import UsageError

Function = Callable[..., Any]

# What runs a backward: as torch functions, and a mode is off inside what it sees.
_BACKWARDS = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
# A torch that doesn't have it can't show what torch.autograd.grad repeats.
redispatch: Function | None = getattr(torch.overrides, "redispatch_function", None)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an activation is called: the same in every forward, and in its repeats.

    module: the path of the activation's module, or of the module that calls the function.
    spelling: the class of the module, or the name of the function.
    number: which of that module's calls of it; of a shared activation, of its caller's.
    """

    module: str
    spelling: str
    number: int
    is_call: bool

    @property
    def key(self) -> str:
        """`layers.1`, `layers.3/relu`; from the second on with its number, `layers.3/relu#1`."""
        name = f"{self.module}/{self.spelling}" if self.is_call else self.module
        return f"{name}#{self.number}" if self.number else name


@dataclass(frozen=True, slots=True)
class Call:
    """One call: `apply` is the model's own function, and may write into what it is given.

    place: None of a function that no module of the model calls, as the loss may.
    """

    place: Place | None
    activation: str | None
    values: Tensor
    apply: Callable[[Tensor], Tensor]


class Handler(Protocol):
    """Answers calls."""

    def answer(self, call: Call) -> Tensor:
        """What the caller gets."""

    def see(
        self,
        path: str | None,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: object,
    ) -> None:
        """Another function was called, by the module of this path, and returned: of no interest."""
        del path, function, args, kwargs, result


def is_closed(module: nn.Module) -> str | None:
    """Why nothing inside of it can be reached, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit.script or trace"
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    # By name: importing torch._dynamo to ask takes a second.
    if compiled or type(module).__name__ == "OptimizedModule":
        return "torch.compile"
    return None


def open_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that can be followed, by path; and the closed ones, with why."""
    closed = {n: why for n, m in model.named_modules() if (why := is_closed(m)) is not None}
    inside = {part for path in closed for part in model.get_submodule(path).modules()}
    found = {n: m for n, m in names.named_modules(model) if m not in inside}
    outermost = {
        path: why
        for path, why in closed.items()
        if not any(path != other and path.startswith(f"{other}.") for other in closed)
    }
    return found, outermost


@dataclass(slots=True)
class _Running:
    module: nn.Module
    path: str
    calls: Counter[tuple[str, str]]


class _Follower:
    """Knows which module runs, and so which call an activation is."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        activations: Mapping[str, str | None],
        handler: Handler,
        *,
        has_compiled: bool,
    ) -> None:
        self._has_compiled = has_compiled
        self._paths = {module: path for path, module in modules.items()}
        self._activations = activations
        self._handler = handler
        self._running: list[_Running] = []
        # What a caller's children are called.
        self._names: dict[nn.Module, dict[nn.Module, str]] = {}
        self._replays: Replays[Place | None] = Replays()
        # Inside an activation, or what is called in place of one, nothing is one of the model's.
        self._is_inside = False
        self._notes = False

    # Which module runs.

    def enters(self, module: nn.Module, args: object, kwargs: object) -> None:
        del args, kwargs
        if torch.compiler.is_compiling():
            return
        if not self._running and not is_replay():
            # Without gradients nothing is repeated.
            self._notes = torch.is_grad_enabled()
        self._running.append(_Running(module, self._paths[module], Counter()))

    def leaves(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        del args, kwargs, output
        if torch.compiler.is_compiling():
            return
        if any(module is other.module for other in self._running):
            # With what an exception that the model caught left behind.
            while self._running.pop().module is not module:
                pass

    # What is called in it.

    def forward_of(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """What is called in place of the forward of an activation's module."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            def apply(given: Tensor) -> Tensor:
                return cast("Tensor", own(given, *args[1:], **kwargs))

            values = args[0] if args else None
            if self._is_inside or not _is_plain(values) or torch.compiler.is_compiling():
                return own(*args, **kwargs)
            place = self._placed(lambda: self._of_module(path, module))
            return self._answer(Call(place, self._activations[path], values, apply))

        return forward

    def of_function(
        self, function: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function that is an activation was called."""
        values = args[0] if args else kwargs.get("input")
        if self._is_inside or not _is_plain(values) or kwargs.get("out") is not None:
            return function(*args, **kwargs)
        if self._has_compiled and is_inside_compiled():
            # A backend that compiles nothing runs Python here.
            return function(*args, **kwargs)
        others = {key: value for key, value in kwargs.items() if key != "input"}

        def apply(given: Tensor) -> Tensor:
            return cast("Tensor", function(given, *args[1:], **others))

        place = self._placed(lambda: self._of_caller(getattr(function, "__name__", name)))
        activation = variant(name, kwargs.get("approximate"))
        return self._answer(Call(place, activation, values, apply))

    def of_other(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        """Another function was called."""
        if not self._is_inside:
            path = self._running[-1].path or ROOT if self._running else None
            self._handler.see(path, function, args, kwargs, result)

    def _answer(self, call: Call) -> Tensor:
        self._is_inside = True
        try:
            return self._handler.answer(call)
        finally:
            self._is_inside = False

    def _placed(self, ask: Callable[[], Place | None]) -> Place | None:
        if is_replay():
            known = self._replays.known()
            place = ask() if known is None else known[0]
            if place is None and known is None:
                message = (
                    "activations: a checkpoint inside a checkpoint repeats a function that no "
                    "module calls there, and which it is can't be told; give the checkpoint a "
                    "module instead of a function"
                )
                raise UsageError(message)
            return place
        place = ask()
        if self._notes:
            self._replays.note(place)
        return place

    def _of_caller(self, spelling: str) -> Place | None:
        if not self._running:
            return None
        top = self._running[-1]
        return self._counted(top.path or ROOT, spelling, is_call=True)

    def _of_module(self, path: str, module: nn.Module) -> Place:
        """Under the caller's name for it: one that several modules share is each one's own."""
        if self._running:
            caller = self._running[-1]
            if caller.module not in self._names:
                self._names[caller.module] = _names_of_children(caller)
            path = self._names[caller.module].get(module, path)
        return self._counted(path, type(module).__name__, is_call=False)

    def _counted(self, path: str, spelling: str, *, is_call: bool) -> Place:
        number = 0
        if self._running:
            calls = self._running[-1].calls
            number = calls[path, spelling]
            calls[path, spelling] += 1
        return Place(path, spelling, number, is_call)


def _names_of_children(caller: _Running) -> dict[nn.Module, str]:
    found: dict[nn.Module, str] = {}
    for name, child in caller.module._modules.items():  # noqa: SLF001  (named_children leaves twins out)
        if child is not None:
            path = f"{caller.path}.{name}" if caller.path else name
            found.setdefault(names.unwrapped(child), path)
    return found


class _FunctionMode(TorchFunctionMode):
    """Shows the follower the functions that are called."""

    def __init__(self, follower: _Follower) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer for an activation; call anything else, and tell."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in _BACKWARDS and redispatch is not None:
            with self:
                return redispatch(func, types, args, kwargs)
        if func is torch.Tensor.backward:
            # In a torch that old, what it calls is no torch function.
            with self:
                return torch.autograd.backward(args[0], **_renamed(kwargs))
        try:
            name = ELEMENTWISE.get(func)
        except TypeError:  # Something of the user's own that has no hash.
            name = None
        if name is not None:
            return self._follower.of_function(func, name, args, kwargs)
        result = func(*args, **kwargs)
        self._follower.of_other(func, args, kwargs, result)
        return result


def _renamed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"grad_tensors" if key == "gradient" else key: kwargs[key] for key in kwargs}


@contextlib.contextmanager
def answering(
    model: nn.Module, activations: Mapping[str, str | None], handler: Handler
) -> Iterator[None]:
    """Have the handler answer every call of an activation, in forwards and in their repeats.

    activations: the modules that are one, by path; what each is.
    """
    modules, closed = open_modules(model)
    has_compiled = "torch.compile" in closed.values()
    follower = _Follower(modules, activations, handler, has_compiled=has_compiled)
    hooks = Hooks(follower)
    with contextlib.ExitStack() as stack:
        stack.callback(hooks.remove)
        for path, module in modules.items():
            if path in activations:
                stack.enter_context(_forward(module, follower.forward_of(path, module)))
            elif _may_call(module):
                hooks.before_forward(module, follower.enters)
                hooks.after_forward(module, follower.leaves, always=True)
        stack.enter_context(_FunctionMode(follower))
        yield


@contextlib.contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    vars(module)["forward"] = replacement
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = own


def _may_call(module: nn.Module) -> bool:
    """Whether it can matter that it is this module that runs."""
    is_leaf = next(module.children(), None) is None
    return not (is_leaf and type(module).__module__.startswith("torch.nn."))


def _is_plain(values: object) -> TypeGuard[Tensor]:
    # What is sharded, nested or fake has rules of its own.
    if type(values) not in {Tensor, nn.Parameter}:
        return False
    tensor = cast("Tensor", values)
    return (
        tensor.dtype.is_floating_point and tensor.layout is torch.strided and not tensor.is_nested
    )
