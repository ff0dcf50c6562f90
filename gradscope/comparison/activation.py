"""The activation functions that are compared, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.naming import known
from gradscope.errors import ConfigError, ConfigTypeError

ActivationFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function.

    kinks: where it or one of its first two derivatives jumps; None where that isn't known.
    """

    name: str
    function: ActivationFunction
    kinks: tuple[float, ...] | None = ()

    def __call__(self, values: Tensor) -> Tensor:
        """The function, entry by entry."""
        return self.function(values)


def _gelu_tanh(values: Tensor) -> Tensor:
    return F.gelu(values, approximate="tanh")


def _relu_squared(values: Tensor) -> Tensor:
    """So et al. 2021, Primer, section 4."""
    return F.relu(values).square()


def _linear(values: Tensor) -> Tensor:
    return values


ACTIVATIONS: Mapping[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("relu", F.relu, (0.0,)),
        Activation("leaky_relu", F.leaky_relu, (0.0,)),
        Activation("elu", F.elu, (0.0,)),
        Activation("selu", F.selu, (0.0,)),
        Activation("celu", F.celu, (0.0,)),
        Activation("gelu", F.gelu),
        Activation("gelu_tanh", _gelu_tanh),
        Activation("silu", F.silu),
        Activation("mish", F.mish),
        Activation("tanh", torch.tanh),
        Activation("sigmoid", torch.sigmoid),
        Activation("hardtanh", F.hardtanh, (-1.0, 1.0)),
        Activation("hardswish", F.hardswish, (-3.0, 3.0)),
        Activation("softplus", F.softplus),
        Activation("relu_squared", _relu_squared, (0.0,)),
        # Not swapped in unless asked for; theory has closed forms of these.
        Activation("linear", _linear),
        Activation("erf", torch.erf),
        Activation("softsign", F.softsign, (0.0,)),
    )
}

# Without `activations=`.
COMPARED = ("own", "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh")

# Other ways to write the same.
_ALSO = {"swish": "silu", "relu2": "relu_squared", "relu²": "relu_squared", "gelu_new": "gelu_tanh"}


def activation_called(wanted: str | ActivationFunction | Activation) -> Activation:
    """The activation of that name, or one made of a function.

    Raises ConfigError for an unknown name, naming the nearest, or for a function that is not
    elementwise or returns NaN; ConfigTypeError for anything else.
    """
    if isinstance(wanted, Activation):
        return wanted
    if isinstance(wanted, str):
        return known("activations", wanted, ACTIVATIONS, _ALSO, "a function of a tensor")
    if not callable(wanted):
        message = f"activations: {wanted!r} is neither a name nor a function of a tensor"
        raise ConfigTypeError(message)
    return _of_function(wanted)


def _of_function(function: ActivationFunction) -> Activation:
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, nn.Module):
        name = type(function).__name__
    probe = torch.linspace(-4, 4, 33).reshape(3, 11)
    with torch.no_grad():
        values = function(probe.clone())
    if not isinstance(values, Tensor) or values.shape != probe.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        message = (
            f"activations: {name} returned {shape} for a tensor of shape {tuple(probe.shape)}; an "
            "activation works entry by entry"
        )
        raise ConfigError(message)
    if not values.isfinite().all():
        where = probe[~values.isfinite()][0].item()
        message = f"activations: {name}({where:g}) is {values[~values.isfinite()][0].item()}"
        raise ConfigError(message)
    return Activation(name, function, None)
