"""The mode that shows which of torch's functions a model calls in its forward."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
# What is told of a call: the function, its arguments, and what it returned.
See = Callable[[Function, tuple[Any, ...], Mapping[str, Any], object], None]

# The stack of modes has no public names: a mode can't be left from below others.
_modes: Callable[[], list[TorchFunctionMode]] = torch.overrides._get_current_function_mode_stack  # noqa: SLF001
_push: Callable[[TorchFunctionMode], None] = torch.overrides._push_mode  # noqa: SLF001
_pop: Callable[[], TorchFunctionMode] = torch.overrides._pop_mode  # noqa: SLF001
# Newer versions of torch can show what is called inside a function.
_redispatch: Function | None = getattr(torch.overrides, "redispatch_function", None)


class ForwardMode(TorchFunctionMode):
    """On while one forward of the model runs, in its thread."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see: See | None = see
        self._thread = threading.get_ident()
        # Of torch's frame that calls the forward, not the frame: it would keep its tensors alive.
        frame = _frame_of_forward()
        self._forward = None if frame is None else id(frame)

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; what it returns is seen."""
        kwargs = kwargs or {}
        see = self._see
        if torch.compiler.is_compiling() or see is None:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and _redispatch is not None:
            # The mode is off inside what it sees; this one's inside is what matters.
            with self:
                return _redispatch(func, types, args, kwargs)
        result = func(*args, **kwargs)
        see(func, args, kwargs, result)
        return result

    def enter(self) -> None:
        """Put it on."""
        _push(self)

    def is_here(self) -> bool:
        """Whether it belongs to the running thread."""
        return self._thread == threading.get_ident()

    def is_over(self) -> bool:
        """Whether its forward does not run any more; only its own thread knows."""
        return self.is_here() and not any(id(frame) == self._forward for frame in _frames())

    def leave(self) -> bool:
        """See nothing from now on, and take it off, also from below others.

        False if it stays on for now: from another thread, and within a function that it sees.
        """
        self._see = None
        if not self.is_here():
            return all(thread.ident != self._thread for thread in threading.enumerate())
        if not any(mode is self for mode in _modes()):
            return self.is_over()
        above = []
        while (top := _pop()) is not self:
            above.append(top)
        for mode in reversed(above):
            _push(mode)
        return True


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)  # noqa: SLF001  (documented; the inspect module's way is slow)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _frame_of_forward() -> Any:
    """The nearest frame in which torch calls a module."""
    code = nn.Module._call_impl.__code__  # noqa: SLF001
    return next((frame for frame in _frames() if frame.f_code is code), None)
