"""What optimizers and modules are given in a training, recorded beside gradscope in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.record import Table
from tests.capture.reference import F64, described, wide

NAN = float("nan")


class Received:
    """The gradients that an optimizer uses, call by call of its step: those of the loss itself.

    A fused optimizer under a GradScaler divides by the scale in its kernel: here numpy does.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.steps: list[dict[str, F64]] = []
        step: Callable[..., Any] = optimizer.step

        def recording(*args: Any, **kwargs: Any) -> Any:
            given = getattr(optimizer, "grad_scale", None)
            scale = 1.0 if given is None else float(given)
            self.steps.append(
                {
                    name: entries(parameter.grad) / scale
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
            return step(*args, **kwargs)

        optimizer.step = recording  # type: ignore[method-assign]


class Arrived:
    """The outputs of a model's modules and the gradients arriving there, as they come."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, F64] = {}
        self.gradients: dict[str, F64] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._see, name or "(root)"))

    def _see(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        self.outputs[name] = entries(output)
        output.register_hook(partial(self._arrive, name))

    def _arrive(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = entries(gradient)


def entries(tensor: Tensor) -> F64:
    """All real numbers in it, as float64."""
    plain = tensor.detach()
    return wide(torch.view_as_real(plain) if plain.is_complex() else plain)


def assert_describes(table: Table, prefix: str, row: int, name: str, expected: F64) -> None:
    """Every statistic that the table has under the prefix, against numpy's."""
    rtol = 1e-4
    with np.errstate(over="ignore"):
        wanted = described([torch.from_numpy(expected)])
    column = table.names.index(name)
    compared = 0
    for statistic, value in wanted.items():
        quantity = prefix + statistic
        if quantity not in table:
            continue
        found = float(table[quantity][row, column])
        # A mean far below the spread is a rounding error of the sums.
        slack = 1e-7 * wanted["rms"] if statistic in {"mean", "std"} else 0.0
        with np.errstate(over="ignore"):
            # The log's precision; it holds infinity for what that can't.
            narrow = float(np.float32(value))
        message = f"{name}, {quantity} in row {row}: {found} instead of {narrow}"
        assert np.isclose(found, narrow, rtol=rtol, atol=slack), message
        compared += 1
    assert compared >= 5
