"""How an initialization draws a weight: a distribution, its scale, the fan that divides it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradscope.comparison.draws import Draws
from gradscope.comparison.roles import Bias, Block, Weight

Distribution = Literal["normal", "uniform", "orthogonal", "delta_orthogonal", "constant"]
Fan = Literal["in", "out", "mean", "none"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Entries of standard deviation scale / √fan; of an orthogonal matrix, `scale` is the gain.

    of_activation: the scale and the biases answer the activation, and don't concern modules with
    nonlinearities of their own (gates), for which the scale is 1 and the biases are 0.
    """

    distribution: Distribution
    scale: float
    fan: Fan = "none"
    bias_std: float = 0.0
    of_activation: bool = False

    @property
    def needs_fan(self) -> bool:
        """Whether the scale counts what is summed: of a table that is looked up, nothing is."""
        return self.fan != "none" or "orthogonal" in self.distribution

    def std(self, block: Block, *, gated: bool = False) -> float:
        """The standard deviation of the block's entries; the gain of orthogonal ones."""
        fans = {
            "in": block.fan_in,
            "out": block.fan_out,
            "mean": (block.fan_in + block.fan_out) / 2,
            "none": 1.0,
        }
        scale = 1.0 if gated and self.of_activation else self.scale
        return scale / math.sqrt(fans[self.fan])


def filled(weight: Weight, like: Tensor, rule: Rule, draws: Draws) -> Tensor:
    """New values for the weight, a tensor like `like`."""
    values = torch.empty_like(like, memory_format=torch.contiguous_format)
    for block in weight.blocks:
        scale = rule.std(block, gated=weight.gated)
        _fill(weight.view(values, block), block, rule.distribution, scale, draws)
    return _padded(weight, values)


def filled_by_default(weight: Weight, like: Tensor, draws: Draws) -> Tensor:
    """New values by the module's own reset_parameters."""
    values = torch.empty_like(like, memory_format=torch.contiguous_format)
    distribution, std = weight.default
    for block in weight.blocks:
        _fill(weight.view(values, block), block, distribution, std, draws)
    return _padded(weight, values)


def filled_bias(bias: Bias, like: Tensor, rule: Rule | None, draws: Draws) -> Tensor:
    """New values for a bias; without a rule those of the module's own reset_parameters."""
    shape = tuple(like.shape)
    if rule is None:
        std = bias.default / math.sqrt(3)
        return (
            _scaled(draws.uniform(bias.name, shape), std, like) if std else (torch.zeros_like(like))
        )
    std = rule.bias_std / math.sqrt(bias.sharers)
    if std and not bias.gated:
        return _scaled(draws.normal(bias.name, shape), std, like)
    values = torch.zeros_like(like)
    if bias.kept is not None:
        values[bias.kept] = like[bias.kept]
    return values


def _fill(part: Tensor, block: Block, distribution: str, scale: float, draws: Draws) -> None:
    shape = tuple(part.shape)
    if distribution == "constant":
        part.fill_(scale)
    elif distribution == "uniform":
        part.copy_(_scaled(draws.uniform(block.key, shape), scale, part))
    elif distribution == "normal":
        part.copy_(_scaled(draws.normal(block.key, shape), scale, part))
    elif distribution == "delta_orthogonal" and block.overlaps:
        # Xiao et al. 2018: one orthogonal matrix at the kernel's centre keeps the norm of every
        # input; a flattened kernel with orthonormal rows does not.
        groups, rows, columns, *kernel = block.shape
        part.zero_()
        centre: tuple[Any, ...] = (..., *((size - 1) // 2 for size in kernel))
        part[centre] = _scaled(
            draws.orthogonal(block.key, rows, columns, count=groups), scale, part
        )
    else:
        groups, rows, columns = block.matrix
        # What a transposed convolution's stride takes from the outputs is given back.
        scale *= math.sqrt(columns / block.fan_in) if block.fan_in < columns else 1.0
        drawn = draws.orthogonal(block.key, rows, columns, count=groups)
        part.copy_(_scaled(drawn, scale, part).view(shape))


def _scaled(drawn: Tensor, scale: float, like: Tensor) -> Tensor:
    # Before it is rounded to a short type.
    return (drawn.to(like.device) * scale).to(like.dtype)


def _padded(weight: Weight, values: Tensor) -> Tensor:
    if weight.padding_row is not None:
        values[weight.padding_row] = 0
    return values
