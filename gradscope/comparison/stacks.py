"""Mean-field theory of layers that are not plain: residual, normalized, zero-padded."""

import math

import numpy as np

from gradscope.comparison.activation import Activation, ActivationFunction, activation_called
from gradscope.comparison.meanfield import (
    MeanField,
    check,
    checked_depth,
    checked_variance,
    layerwise,
)
from gradscope.comparison.quadrature import expectations, moments
from gradscope.errors import ConfigError

# (B − 2) / (B − 3) has no meaning below.
_SMALLEST_BATCH = 4


def residual(
    activation: str | ActivationFunction | Activation,
    weight_variance: float,
    bias_variance: float = 0.0,
    *,
    scale: float = 1.0,
    q0: float = 1.0,
    depth: int | None = None,
) -> MeanField:
    """Blocks h + a (W φ(h) + b): χ = 1 + a² σ_w² E φ′², q grows by a² (σ_w² E φ² + σ_b²).

    scale: a; 1/√L keeps the gain of L blocks below e for ReLU with σ_w² = 2. q0: the variance
    that the first block is given. Raises ConfigError. Yang & Schoenholz 2017.
    """
    known = activation_called(activation)
    check(weight_variance=weight_variance, bias_variance=bias_variance)
    check(scale=abs(scale))
    checked_variance(q0)
    blocks = checked_depth(depth)
    share = scale**2
    q, found = layerwise(
        expectations(known),
        q0,
        blocks,
        lambda m: m.q + share * (weight_variance * m.phi2 + bias_variance),
    )
    # What comes along the branch alone has the spread 3κ; with the skip's 1 the formula is another.
    nothing = math.nan
    return MeanField(
        activation=known.name,
        weight_variance=float(weight_variance),
        bias_variance=float(bias_variance),
        q=q,
        chi=1 + share * weight_variance * np.array([m.dphi2 for m in found]),
        kurtosis=np.full(blocks, nothing),
        q_star=nothing,
        stability=nothing,
        chi_star=nothing,
        correlation_star=nothing,
        xi_correlation=nothing,
        xi_gradient=nothing,
        amplification=nothing,
        remark="q grows from block to block: read the blocks",
    )


def layer_norm(activation: str | ActivationFunction | Activation) -> float:
    """χ of W φ(LayerNorm(h)): E φ′(z)² / E φ(z)², whatever the weight variance.

    Raises ConfigError. Cf. Doshi, He & Gromov 2021.
    """
    known = activation_called(activation)
    there = moments(known, 1.0)
    return _ratio(there.dphi2, there.phi2, known.name)


def batch_norm(
    activation: str | ActivationFunction | Activation, batch: int | None = None
) -> float:
    """χ of W φ(BatchNorm(h)) in training mode: E φ′(z)² / Var φ(z), π/(π − 1) for ReLU.

    Never below 1, and 1 only for a line (Poincaré): depth explodes whatever the weights. batch:
    how many samples (by positions) are normalized together, None for many; (B − 2)/(B − 3), the
    factor of a linear net, then stands in for what is not known of others. Raises ConfigError.
    Yang et al. 2019.
    """
    known = activation_called(activation)
    there = moments(known, 1.0)
    chi = _ratio(there.dphi2, there.variance, known.name)
    if batch is None:
        return chi
    if batch < _SMALLEST_BATCH:
        message = f"batch: of {batch} samples nothing is known; give {_SMALLEST_BATCH} or more"
        raise ConfigError(message)
    return chi * (batch - 2) / (batch - 3)


def padding_factor(kernel: int, grid: int, dims: int = 2, depth: int | None = None) -> float:
    """What zero padding leaves of χ in a convolution of the grid's own size and stride 1.

    kernel, grid: along each of `dims` dimensions. depth: over so many layers the geometric mean,
    from a gradient that is the same everywhere; None for the limit of many, for a kernel of 3
    ((1 + 2 cos(π/(n + 1))) / 3)^dims. Circular padding has 1. Raises ConfigError.
    """
    for name, value in (("kernel", kernel), ("grid", grid), ("dims", dims)):
        if value < 1:
            message = f"{name}: {value} is no size; give 1 or more"
            raise ConfigError(message)
    offsets = np.arange(grid)[:, None] - np.arange(grid)
    reach = (kernel - 1) // 2
    # An even kernel's extra place is on the right.
    averaging = ((offsets >= -reach) & (offsets <= kernel - 1 - reach)) / kernel
    if depth is None:
        return float(np.abs(np.linalg.eigvals(averaging)).max() ** dims)
    layers = checked_depth(depth)
    energy = np.linalg.matrix_power(averaging, layers).sum() / grid
    return float(energy ** (dims / layers))


def _ratio(above: float, below: float, name: str) -> float:
    if not 0 < below < math.inf:
        message = f"activation: {name} does not vary: its outputs can't be normalized"
        raise ConfigError(message)
    return above / below
