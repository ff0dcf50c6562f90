"""Inside torch.compile: how a compiled graph tells what its modules return.

A hook that torch.compile traces leaves opaque ops in the graph, and nothing else. They are there
for good; whether they do anything is decided when they run, in Python, on real tensors. Nothing
that changes from step to step, or from one block to the next, becomes part of the graph: hence
no graph break and no recompilation. docs/decisions/0013 has the facts that this rests on.
"""

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import count
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradscope.capture.closed import why_closed
from gradscope.capture.outputs import first_input, first_tensor, output_loss

# An output in a graph: the inlet of its module, and which of the hooks' calls in the graph.
Place = tuple[int, int]

_SCHEMAS = (
    "begin(Tensor? input, Tensor slot) -> ()",
    "end(Tensor? loss, Tensor? output, Tensor slot) -> ()",
    "output(Tensor output, Tensor slot, int call, bool awaited) -> ()",
    "gradient(Tensor gradient, Tensor slot, int call) -> ()",
)
# Of a hook that is to leave nothing in the graph.
_SILENT = -1
# Why it may have to.
OLD_TORCH = "a torch before 2.13"

# What torch 2.6 does not have; it can't tell of modules in a graph either.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

_numbers = count()
_inlets: "weakref.WeakValueDictionary[int, Inlet]" = weakref.WeakValueDictionary()


class GradientTap(Protocol):
    """Takes the gradient of one module use."""

    @property
    def row(self) -> int | None:
        """The row of the use in its table, if it has one to itself."""

    def __call__(self, gradient: Tensor) -> None:
        """The gradient has arrived."""


def _ignore(*_: object) -> None:
    """Nothing."""


class Inlet:
    """Where a compiled graph reaches the owner of a hook that was traced into it.

    trace: what is compiled in place of the hook, one of those below.
    on_trace: told when that happens; where the graph can't tell of it, why.
    tell: given what the ops of `trace` are given, when they run; None for a tensor of which
        nothing may be computed.
    gradient: given a gradient and the place of the output at which it arrives.
    """

    __slots__ = ("__weakref__", "gradient", "number", "on_trace", "slot", "tell", "trace")

    def __init__(
        self,
        trace: Callable[..., None],
        on_trace: Callable[[str | None], None],
        tell: Callable[..., None],
        gradient: Callable[[Tensor, Place], None] = _ignore,
    ) -> None:
        self.trace, self.on_trace, self.tell, self.gradient = trace, on_trace, tell, gradient
        self.number = next(_numbers)
        # The graph gets the number as an input, not as a constant: blocks of one class share a
        # graph. It is read on the host, hence on the CPU.
        self.slot = torch.tensor(self.number, dtype=torch.int64, device="cpu")
        _inlets[self.number] = self


# What is traced: compiled code, in which no more than this may happen.


def trace_begin(inlet: Inlet, module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward begins: tell(its first input of numbers, or None)."""
    del module
    if _announce(inlet.slot) != _SILENT and torch.is_grad_enabled():
        torch.ops.gradscope.begin(first_input((args, kwargs)), inlet.slot)


def trace_end(inlet: Inlet, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
    """A forward ends: tell(the loss that it returns, its first floating output; or None)."""
    del module, args, kwargs
    if _announce(inlet.slot) != _SILENT and torch.is_grad_enabled():
        torch.ops.gradscope.end(output_loss(value), first_tensor(value), inlet.slot)


def trace_output(inlet: Inlet, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
    """A module returns: tell(tensor, place, whether a gradient may come), then gradient()."""
    del module, args, kwargs
    slot = inlet.slot
    call = _announce(slot)
    tensor = first_tensor(value)
    if call == _SILENT or tensor is None or not torch.is_grad_enabled():
        return
    # A leaf lives longer than the step, and so would its hook.
    awaited = tensor.requires_grad and not tensor.is_leaf
    torch.ops.gradscope.output(tensor, slot, call, awaited)
    if awaited:

        def arrive(gradient: Tensor) -> None:
            torch.ops.gradscope.gradient(gradient, slot, call)

        tensor.register_hook(arrive)


def _announce(slot: Tensor) -> int:
    """Called by the compiler itself while it traces: which call in its graph this is."""
    try:
        inlet = _inlets[int(slot)]
        why_not = why_closed() if _define_ops() else OLD_TORCH
        inlet.on_trace(why_not)
        return _next_call() if why_not is None else _SILENT
    except Exception:  # noqa: BLE001  (an error here would be one of the user's compilation)
        return _SILENT


# The compiler takes what it returns as a constant, without a graph break; the mark of
# torch.compiler.assume_constant_result, which would import the compiler.
_announce._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001

# Of the graph that is being traced, and how many calls it has. Counting anew in each lets the
# compiler's caches on disk recognize it.
_tracing: Callable[[], object | None] = lambda: None  # noqa: E731
_calls = count()


def _next_call() -> int:
    global _tracing, _calls
    graph = torch._guards.TracingContext.try_get()  # noqa: SLF001
    if graph is None or _tracing() is not graph:
        _tracing, _calls = (lambda: None) if graph is None else weakref.ref(graph), count()
    return next(_calls)


# What the ops do when a graph runs. Nothing is computed on tensors that autograd tracks.


def _begin(value: Tensor | None, slot: Tensor) -> None:
    _tell(slot, value)


def _end(loss: Tensor | None, output: Tensor | None, slot: Tensor) -> None:
    _tell(slot, loss, _readable(output))


def _output(value: Tensor, slot: Tensor, call: int, awaited: bool) -> None:  # noqa: FBT001
    _tell(slot, value, (int(slot), call), awaited)


def _tell(slot: Tensor, value: Tensor | None, *known: object) -> None:
    inlet = _inlets.get(int(slot))
    if inlet is not None:
        # It was when this was traced; the graph itself runs without.
        with torch.enable_grad():
            inlet.tell(_readable(value), *known)


def _readable(value: Tensor | None) -> Tensor | None:
    return None if value is None or _is_replayed(value) else value.detach()


def _is_replayed(tensor: Tensor) -> bool:
    """Whether CUDA graphs are made of what is compiled: they are replayed without Python.

    What is computed while one is made, or warmed up, lies in memory that the replays overwrite.
    """
    if not tensor.is_cuda:
        return False
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return torch.cuda.is_current_stream_capturing()
    try:
        return trees.get_manager(tensor.get_device(), create_if_none_exists=False) is not None
    except (AttributeError, RuntimeError):
        # A thread that knows of none, or another torch.
        return True


def _gradient(gradient: Tensor, slot: Tensor, call: int) -> None:
    inlet = _inlets.get(int(slot))
    if inlet is not None:
        inlet.gradient(gradient.detach(), (int(slot), call))


@functools.cache
def _define_ops() -> bool:
    """Whether this torch takes the ops, and a hook on a gradient, into a graph."""
    try:
        from torch._higher_order_ops import register_hook  # noqa: F401, PLC0415
        from torch._library.effects import EffectType  # noqa: PLC0415

        library = torch.library.Library("gradscope", "FRAGMENT")
        for schema, run in zip(_SCHEMAS, (_begin, _end, _output, _gradient), strict=True):
            name = schema.partition("(")[0]
            library.define(schema)
            library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"gradscope::{name}", _ignore, lib=library)
            # An op that returns nothing is dropped otherwise.
            library._register_effectful_op(f"gradscope::{name}", EffectType.ORDERED)  # noqa: SLF001
    except (ImportError, AttributeError):
        return False
    _libraries.append(library)
    return True


# An op lives as long as its library.
_libraries: list[torch.library.Library] = []


class AwaitedGradients:
    """Which tap each gradient is for that a compiled graph may bring within a step.

    A graph names an output by its place. Where the graph ran several times in a step, autograd
    goes back through the latest run first.
    """

    def __init__(self) -> None:
        self._expected: dict[Place, list[GradientTap]] = {}
        self._waiting: dict[Place, list[GradientTap]] = {}
        self._arrived: Counter[Place] = Counter()

    def expect(self, place: Place, tap: GradientTap) -> None:
        """A gradient may come for this tap."""
        self._expected.setdefault(place, []).append(tap)
        self._waiting.setdefault(place, []).append(tap)

    def arrive(self, place: Place, gradient: Tensor) -> None:
        """Hand it on; what nobody awaits belongs to no step."""
        waiting = self._waiting.get(place)
        if waiting:
            self._arrived[place] += 1
            # Through a graph that is kept they come again.
            tap = waiting.pop() if len(waiting) > 1 else waiting[0]
            tap(gradient)

    def uncertain(self) -> set[int]:
        """Table rows that may have each other's: of several uses, some got none, or two."""
        found: set[int] = set()
        for place, taps in self._expected.items():
            rows = {tap.row for tap in taps}
            if len(rows) > 1 and self._arrived[place] not in {0, len(taps)}:
                found |= {row for row in rows if row is not None}
        return found


# The compiler around all this.


def run_as_it_is(function: Callable[..., Any]) -> None:
    """Keep torch.compile from compiling a hook of ours that it meets outside of what it traces."""
    # Where torch.compile leaves a module's call to Python, it would make a graph of each hook.
    frames: Any = torch._C._dynamo.eval_frame  # noqa: SLF001  (no public way)
    function = getattr(function, "__func__", function)
    try:
        skip = frames._FrameAction.SKIP  # noqa: SLF001
        strategy = frames._FrameExecStrategy(skip, skip)  # noqa: SLF001
        code: CodeType = function.__code__
        frames.set_code_exec_strategy(code, strategy)
    except AttributeError:
        # Another torch: a small graph more.
        return


def is_traced() -> bool:
    """Whether torch.compile is tracing here, and not torch.export, whose result is kept."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting()


def graphs() -> int:
    """How much has been compiled in this process."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    return len(getattr(getattr(compiler, "output_codes", None), "seen", ()))


def forget_graphs() -> None:
    """Have everything that was compiled traced anew when it runs next.

    A graph without hooks is not looked at again when hooks are added: torch.compile leaves out
    that check, for speed.
    """
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset_code_caches()
