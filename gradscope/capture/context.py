"""From where gradscope's code is called: inside a backward, a function transform, a GradScaler."""

import sys

import torch

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
    # Neither question has a public name in torch.
    replays: bool = torch._C._current_graph_task_id() != -1  # noqa: SLF001
    transforms: bool = torch._C._functorch.maybe_current_level() is not None  # noqa: SLF001
    return replays or transforms


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
