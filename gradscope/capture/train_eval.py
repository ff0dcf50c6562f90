"""Of modules that behave otherwise in evaluation: in which mode they ran, and what they keep."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from gradscope.capture import statistics
from gradscope.capture.precision import widened
from gradscope.capture.recorder import Rows

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # noqa: SLF001  (the only common base)
_DROPOUTS = nn.modules.dropout._DropoutNd  # noqa: SLF001


class TrainEval:
    """The modes of dropouts and batch norms, and the latter's running statistics."""

    def __init__(self) -> None:
        # As they were before the step's first forward, which changes them.
        self._buffers: dict[nn.Module, list[Tensor]] = {}

    def arm(self, modules: Iterable[nn.Module]) -> None:
        """A recorded step begins."""
        kept = {module: _running(module) for module in modules if isinstance(module, _BATCH_NORMS)}
        squares = iter(statistics.squares_of([b for both in kept.values() for b in both]))
        self._buffers = {module: [next(squares) for _ in both] for module, both in kept.items()}

    def measure(self, rows: Rows, row: int, module: nn.Module) -> None:
        """A module has run."""
        if isinstance(module, (_BATCH_NORMS, _DROPOUTS)):
            mode = torch.full((), float(module.training), device="cpu")
            rows.add("training", row, widened(mode), 1.0)
        for squares in self._buffers.pop(module, ()):
            rows.add("buffers", row, squares)

    def release(self) -> None:
        """The step is over."""
        self._buffers = {}


def _running(module: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    """Its running mean and variance, if it keeps them."""
    both = (module.running_mean, module.running_var)
    return [b for b in both if b is not None and not isinstance(b, UninitializedBuffer)]
