"""Activations: which functions are the same as which modules, and where their ranges end."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# An output at or beyond these is saturated: the derivative there is below 6 % of its largest
# (tanh: |y| > 0.97, the limit of Karpathy's makemore, part 3; sigmoid is a scaled tanh).
_SATURATION: dict[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-0.97, 0.97),
    nn.Softsign: (-0.97, 0.97),
    nn.Sigmoid: (0.015, 0.985),
    nn.Hardsigmoid: (0.0, 1.0),
}

# What torch calls the functions; each may be in torch, torch.nn.functional and among the methods
# of a tensor, and have an in-place twin with an underscore.
_FUNCTIONS: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "glu": nn.GLU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softmax": nn.Softmax,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}


def _functions() -> Iterator[tuple[Callable[..., Any], str]]:
    for name in _FUNCTIONS:
        for home in (F, torch, Tensor, torch.special):
            for spelled in (name, f"{name}_"):
                if (function := getattr(home, spelled, None)) is not None:
                    yield function, name
    yield torch.special.expit, "sigmoid"


# Function → its name, the same for all its spellings.
FUNCTIONS: Mapping[Callable[..., Any], str] = dict(_functions())


def kind_of(function: str) -> type[nn.Module]:
    """The module that does the same as the function of this name."""
    return _FUNCTIONS[function]


def range_of_module(module: nn.Module) -> tuple[float, float] | None:
    """The ends of the range of a bounded activation; None of any other."""
    # ReLU6 is one too, but its zeros are an activation's, not saturation.
    if type(module) is nn.Hardtanh:
        return module.min_val, module.max_val
    return _SATURATION.get(type(module))


def range_of_call(
    function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """The same of a function of this name, as it was called."""
    kind = kind_of(function)
    if kind is not nn.Hardtanh:
        return _SATURATION.get(kind)
    low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)  # noqa: PLR2004  (as torch has them)
    return float(low), float(high)
