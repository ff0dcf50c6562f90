"""Deep fully connected nets with random weights, and what autograd says of their gradients."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope.comparison.activation import Activation

F64 = NDArray[np.float64]

SAMPLES = 4


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normals that nets of all variances share. weights: depth × width × width."""

    inputs: Tensor
    weights: tuple[Tensor, ...]
    biases: Tensor
    cotangent: Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """Per sample, of shape (depth - 1, samples), from the first layer on.

    log_chi: ln ‖δ^l‖² − ln ‖δ^(l+1)‖². plug_in: ln of ‖W^(l+1)‖² / width times the mean φ′².
    """

    log_chi: F64
    plug_in: F64


def noise(width: int, depth: int, seed: int) -> Noise:
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, width, generator=source)
    return Noise(
        inputs / inputs.square().mean(1, keepdim=True).sqrt(),
        tuple(torch.randn(width, width, generator=source) for _ in range(depth)),
        torch.randn(depth, width, generator=source),
        torch.randn(SAMPLES, width, generator=source),
    )


def measure(
    activation: Activation, weight_variance: float, bias_variance: float, draws: Noise
) -> Measured:
    width = draws.inputs.shape[1]
    spread = (weight_variance / width) ** 0.5
    values = draws.inputs.clone().requires_grad_()
    seen = []
    for weight, bias in zip(draws.weights, draws.biases, strict=True):
        seen.append(values @ (spread * weight).T + bias_variance**0.5 * bias)
        values = activation(seen[-1])
    gradients = torch.autograd.grad(seen[-1], seen[:-1], draws.cotangent)
    norms = torch.stack([g.double().square().sum(1) for g in (*gradients, draws.cotangent)])
    chi = norms.log().diff(dim=0).neg()
    plug_in = []
    for before, weight in zip(seen[:-1], draws.weights[1:], strict=True):
        at = before.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad(activation(at).sum(), at)
        energy = spread**2 * weight.double().square().sum() / width
        plug_in.append((energy * slope.square().mean(1)).log())
    return Measured(chi.numpy(), torch.stack(plug_in).detach().numpy())
