"""A device without float64, as Apple's are, played by the CPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradscope.capture.precision import has_float64

_WIDE = (torch.float64, torch.complex128)


class _Forbidding(TorchDispatchMode):
    """Raises, as such a device does, when an operator takes, makes or is asked for float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        self._refuse(func, (args, kwargs))
        result = func(*args, **kwargs)
        self._refuse(func, result)
        return result

    def _refuse(self, func: object, values: object) -> None:
        for value in tree_leaves(values):
            dtype = value.dtype if isinstance(value, Tensor) else value
            wide = isinstance(dtype, torch.dtype) and dtype in _WIDE
            # A GradScaler has a way of its own on such devices, by their name.
            if wide and not _in_grad_scaler():
                self.refused.append(str(func))
                message = "Cannot convert a MPS Tensor to float64 dtype"
                raise TypeError(message)


def _in_grad_scaler() -> bool:
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        if frame.f_code.co_filename.endswith("grad_scaler.py"):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


@contextmanager
def no_float64() -> Iterator[list[str]]:
    """In this thread there is none; yields what was refused: by the end, that must be nothing.

    What arrives on the host is another thread's matter.
    """
    has_float64.cache_clear()
    try:
        with _Forbidding() as device:
            # gradscope asks, and is told so.
            assert not has_float64(torch.device("cpu"))
            device.refused.clear()
            yield device.refused
            assert device.refused == []
    finally:
        has_float64.cache_clear()
