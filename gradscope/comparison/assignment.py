"""Giving a weight new values, however the module makes it.

On a parametrized weight `nn.init` and `reset_parameters()` change a temporary tensor: silently
nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# From anywhere, the estimate of a largest singular value is then within about 1 %.
_POWER_ITERATIONS = 30


def underlying(owner: nn.Module, attribute: str) -> tuple[nn.Parameter, ...]:
    """The parameters of which the weight is made; none where the module makes it in another way."""
    # getattr would compute a parametrized weight.
    held = owner._parameters.get(attribute)  # noqa: SLF001
    if held is not None:
        return (held,)
    if is_parametrized(owner, attribute):
        parametrizations: Any = owner.parametrizations
        return tuple(parametrizations[attribute].parameters())
    for hook in _hooks(owner, attribute):
        made_of = ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)
        return tuple(owner.get_parameter(attribute + part) for part in made_of)
    return ()


def assign(owner: nn.Module, attribute: str, values: Tensor) -> None:
    """The weight gets these values, or what its parametrization makes of them.

    Raises what a parametrization's right_inverse does where it has none.
    """
    held = owner._parameters.get(attribute)  # noqa: SLF001
    with torch.no_grad():
        if held is not None:
            # The version stays: a graph that a forward of the user's builds inside may go on.
            held.data.copy_(values)
        elif is_parametrized(owner, attribute):
            setattr(owner, attribute, values)
            _settle(owner, attribute)
        else:
            for hook in _hooks(owner, attribute):
                _assign_through(hook, owner, attribute, values)


def _hooks(owner: nn.Module, attribute: str) -> Iterator[WeightNorm | SpectralNorm]:
    """What torch.nn.utils.weight_norm and spectral_norm, the older ones, put on a module."""
    for hook in owner._forward_pre_hooks.values():  # noqa: SLF001
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == attribute:
            yield hook


def _assign_through(
    hook: WeightNorm | SpectralNorm, owner: nn.Module, attribute: str, values: Tensor
) -> None:
    if isinstance(hook, WeightNorm):
        owner.get_parameter(f"{attribute}_v").copy_(values)
        norms = torch.norm_except_dim(values, 2, hook.dim)
        owner.get_parameter(f"{attribute}_g").copy_(norms)
        setattr(owner, attribute, hook.compute_weight(owner))
        return
    owner.get_parameter(f"{attribute}_orig").copy_(values)
    for _ in range(_POWER_ITERATIONS):
        made = hook.compute_weight(owner, do_power_iteration=True)
    setattr(owner, attribute, made)


def _settle(owner: nn.Module, attribute: str) -> None:
    """Spectral norm iterates once per reading in train mode; the old vectors are far off."""
    parametrizations: Any = owner.parametrizations
    chain = parametrizations[attribute]
    if not any(type(part).__name__ == "_SpectralNorm" for part in chain):
        return
    modes = [(part, part.training) for part in chain.modules()]
    chain.train()
    for _ in range(_POWER_ITERATIONS):
        getattr(owner, attribute)
    for part, training in modes:
        part.training = training
