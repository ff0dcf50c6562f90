"""From where gradscope's code is called, and whether what calls it is compiled."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _TorchDispatchModeKey as ModeKey

# optimizer.step() ← its wrappers ← GradScaler.step(): that near, or not at all.
_FRAMES = 12


def is_set_apart() -> bool:
    """Whether a forward that runs now is not training's own.

    Activation checkpointing repeats forwards inside the backward; `torch.func` runs them on
    wrapped tensors that hold no numbers; tracing and compiling would take what is computed here
    into the user's graph.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # noqa: SLF001
        return True
    # None of these questions has a public name in torch.
    get_mode = torch._C._get_dispatch_mode  # noqa: SLF001
    if get_mode(ModeKey.FAKE) is not None or get_mode(ModeKey.PROXY) is not None:
        return True
    replays: bool = torch._C._current_graph_task_id() != -1  # noqa: SLF001
    return replays or is_transformed()


def is_transformed() -> bool:
    """Whether this runs inside a transform of `torch.func`."""
    level: Any = torch._C._functorch.maybe_current_level()  # noqa: SLF001  (no public way)
    return level is not None


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made it, for one forward in a thread of its own."""
    return "_is_replica" in vars(module)


def replayed_node() -> int | None:
    """The sequence number of the custom function that repeats a forward in its backward, if any.

    A re-entrant checkpoint is one. Torch numbers nodes in the order in which they were made, in
    each thread.
    """
    node = torch._C._current_autograd_node()  # noqa: SLF001
    # What a checkpoint of the other kind repeats is asked for by nodes of torch's own.
    is_custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    return int(node._sequence_nr()) if is_custom else None  # noqa: SLF001


def last_node() -> int:
    """The sequence number of the node that was made last in this thread."""
    return int(torch._C._autograd._get_sequence_nr()) - 1  # noqa: SLF001


def adds_to_gradients(parameters: Iterable[Tensor]) -> bool:
    """Whether the backward that runs adds to `.grad` of any of these; `autograd.grad` doesn't."""
    for parameter in parameters:
        if parameter.requires_grad:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            try:
                if torch._C._will_engine_execute_node(node):  # noqa: SLF001
                    return True
            except RuntimeError:
                # Torch's answer where autograd.grad was asked for this very one.
                return False
    return False


def called_by_grad_scaler() -> bool:
    """Whether a GradScaler called the optimizer's step: the loss was scaled, then."""
    frame = sys._getframe(1)  # noqa: SLF001  (documented; the inspect module's way is slow)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_filename.endswith("grad_scaler.py"):
            return True
    return False


def is_inside_compiled() -> bool:
    """Whether what torch.compile made calls this, if not from within a graph."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            return True
    return False


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was asked to compile the model or a part of it."""
    # By name: importing torch._dynamo to ask takes a second.
    return any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
