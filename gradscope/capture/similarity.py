"""How alike the outputs of different samples are: of some layers, on some recorded steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradscope.capture import pairs
from gradscope.capture.entities import ROOT, module_group
from gradscope.capture.guard import PROBES, Guard
from gradscope.capture.probes import sampled
from gradscope.capture.recorder import Rows
from gradscope.capture.samples import Draw, is_turn, spread

_LAYERS, _SAMPLES, _COORDINATES = 32, 64, 128
_KINDS = frozenset({"linear", "convolution", "norm", "activation"})
_FORMATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class OutputSimilarity:
    """Compares the samples of a batch with one another; they are dimension 0 of an output."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._modules: frozenset[nn.Module] = frozenset()
        self._samples = Draw(_SAMPLES, distinct=True)
        self._coordinates = Draw(_COORDINATES)
        self._recorded = 0

    def choose(self, names: Mapping[nn.Module, str]) -> None:
        """Layers all over the depth, and the model itself."""
        root = [module for module, name in names.items() if name == ROOT]
        layers = [module for module in names if module_group(module) in _KINDS]
        self._modules = frozenset([*root, *spread(layers, _LAYERS)])

    def begin(self) -> None:
        """A step is recorded."""
        self._recorded += 1

    def measure(self, rows: Rows, row: int, module: nn.Module, output: Tensor) -> None:
        """The mean cosine of the outputs of two samples."""
        if module in self._modules and is_turn(self._recorded):
            self._guard.run(PROBES, self._measure, rows, row, module, output)

    def _measure(self, rows: Rows, row: int, module: nn.Module, output: Tensor) -> None:
        # Only a batch has samples; of what is split over processes there is a part.
        if type(output) is not Tensor or output.dtype not in _FORMATS or _is_single(module, output):
            return
        if output.dim() > 1 and len(output) > 1 and output.numel() and not output.is_sparse:
            sample = sampled(output.detach(), self._samples, self._coordinates)
            rows.add("similarity", row, pairs.mean_cosine(sample))


def _is_single(module: nn.Module, output: Tensor) -> bool:
    """Whether it is a convolution's output for one sample without a batch's dimension."""
    # Not by its weight: that may be computed anew for whoever looks.
    kernel = getattr(module, "kernel_size", None)
    if module_group(module) != "convolution" or not isinstance(kernel, tuple):
        return False
    return output.dim() < len(kernel) + 2
