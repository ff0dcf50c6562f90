"""Layer-sequential unit variance (Mishkin & Matas 2016): every layer's output has variance 1."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture.trial import same_modes_and_buffers
from gradscope.comparison.assignment import assign, underlying
from gradscope.comparison.roles import Layout, Weight

# The paper allows 0.1 and ten tries; without biases the first try is exact.
_TOLERANCE = 0.01
_TRIES = 10


@dataclass(slots=True)
class _Scaling:
    """A weight that is rescaled, and the variances of its outputs in one pass."""

    weight: Weight
    variances: list[float] = field(default_factory=list)
    used_often: bool = False


def unit_variance(
    model: nn.Module, weights: tuple[Weight, ...], forward: Callable[[], object]
) -> tuple[str, ...]:
    """Rescale each weight, in the order in which they run; returns what could not be, and why.

    A module that is used several times, and a weight that several modules share, get the scale
    at which the mean variance of all uses is 1. Training flags and buffers (running statistics)
    are afterwards as they were.
    """
    scalings = {
        id(underlying(w.owner, w.attribute)[0]): _Scaling(w)
        for w in weights
        if not w.gated and w.layout is not Layout.LOOKUP
    }
    with same_modes_and_buffers(model), ExitStack() as hooked:
        for handle in _hook(model, scalings):
            hooked.callback(handle.remove)
        for _ in range(_TRIES):
            for scaling in scalings.values():
                scaling.variances.clear()
            forward()
            if not _pooled(scalings):
                break
    return tuple(_why_not(scalings))


def _hook(model: nn.Module, scalings: dict[int, _Scaling]) -> list[Any]:
    handles = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            continue  # Its output is that of another layer.
        made_of = underlying(module, "weight")
        scaling = scalings.get(id(made_of[0])) if made_of else None
        if scaling is not None and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            hook = _rescaling(scaling)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return handles


def _rescaling(scaling: _Scaling) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        first = not scaling.variances and not scaling.used_often
        made = output
        variance = _variance(made)
        for _ in range(_TRIES if first else 0):
            if not 0 < variance < float("inf") or abs(variance**0.5 - 1) <= _TOLERANCE:
                break
            _rescale(module, variance)
            # Hooks of the weight's own (the older weight_norm) have made it anew.
            made = module.forward(*args, **kwargs)
            variance = _variance(made)
        scaling.variances.append(variance)
        return None if made is output else made

    return hook


def _variance(output: Tensor) -> float:
    return float(output.detach().double().var(correction=0))


def _rescale(module: nn.Module, variance: float) -> None:
    with torch.no_grad():
        values: Tensor = module.weight  # type: ignore[assignment]
        assign(module, "weight", values / variance**0.5)


def _pooled(scalings: dict[int, _Scaling]) -> bool:
    """Rescale what is used several times by the mean of its variances; True if anything moved."""
    moved = False
    for scaling in scalings.values():
        if len(scaling.variances) < 2:  # noqa: PLR2004
            continue
        scaling.used_often = True
        variance = sum(scaling.variances) / len(scaling.variances)
        if 0 < variance < float("inf") and abs(variance**0.5 - 1) > _TOLERANCE:
            _rescale(scaling.weight.owner, variance)
            moved = True
    return moved


def _why_not(scalings: dict[int, _Scaling]) -> Iterator[str]:
    for scaling in scalings.values():
        name, variances = scaling.weight.name, scaling.variances
        if not variances:
            yield f"{name} is orthogonal and not rescaled: no output of its module was seen"
            continue
        std = (sum(variances) / len(variances)) ** 0.5
        if not abs(std - 1) <= 2 * _TOLERANCE:
            yield f"{name}: its output's standard deviation stays at {std:.3g}"
