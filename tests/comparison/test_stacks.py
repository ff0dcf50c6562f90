"""Residual, normalized and padded stacks against closed forms, and against layers of torch."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradscope.comparison.activation import activation_called
from gradscope.comparison.stacks import batch_norm, layer_norm, padding_factor, residual
from gradscope.errors import ConfigError


def test_residual_relu_doubles() -> None:
    found = residual("relu", 2.0, depth=30)
    assert found.chi == pytest.approx([2.0] * 30)
    assert found.q == pytest.approx([2.0**block for block in range(30)])
    scaled = residual("relu", 2.0, scale=30**-0.5, depth=30)
    assert math.exp(scaled.log_gain) == pytest.approx((1 + 1 / 30) ** 30)


@pytest.mark.parametrize(("depth", "chi", "q"), [(30, 1.1960, 22.5), (100, 1.1112, 84.4)])
def test_residual_tanh_grows_slower_than_any_exponential(depth: int, chi: float, q: float) -> None:
    found = residual("tanh", 1.0, depth=depth + 1)
    per_block = math.exp(residual("tanh", 1.0, depth=depth).log_gain / depth)
    assert per_block == pytest.approx(chi, abs=2e-4)
    assert found.q[-1] == pytest.approx(q, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "chi"),
    [
        ("relu", math.pi / (math.pi - 1)),
        ("tanh", 1.1778),
        ("gelu", 1.3188),
        ("silu", 1.2121),
        ("selu", 1.0716),
        ("hardtanh", 1.3229),
        ("linear", 1.0),
        ("sigmoid", 1.0336),
        ("erf", 1.2257),
        ("mish", 1.2143),
        ("hardswish", 1.1796),
        ("softplus", 1.0805),
    ],
)
def test_batch_norm(name: str, chi: float) -> None:
    assert batch_norm(name) == pytest.approx(chi, abs=6e-5)
    assert batch_norm(name, 34) == pytest.approx(chi * 32 / 31, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "chi"),
    [("relu", 1.0), ("tanh", 1.1778), ("gelu", 1.0720), ("silu", 1.0666), ("sigmoid", 0.1528)],
)
def test_layer_norm(name: str, chi: float) -> None:
    assert layer_norm(name) == pytest.approx(chi, abs=6e-5)


def _measured(name: str, batch: int, norm: type[nn.Module]) -> float:
    """Geometric mean of χ over a plain stack, of the whole batch's gradient."""
    width, depth, seeds = 256, 12, 16
    activation = activation_called(name)
    total = 0.0
    for seed in range(seeds):
        source = torch.Generator().manual_seed(seed)

        def normal(*shape: int, source: torch.Generator = source) -> Tensor:
            return torch.randn(*shape, generator=source)

        values, seen = normal(batch, width).requires_grad_(), []
        for _ in range(depth):
            # What is normalized next has any scale.
            seen.append(values @ normal(width, width).T * (2 / width) ** 0.5)
            values = activation(norm(width)(seen[-1]))
        gradients = torch.autograd.grad(seen[-1], seen, normal(batch, width))
        first, last = (g.square().sum().log().item() for g in (gradients[1], gradients[-1]))
        # Norms leave the scale of their input in the gradient: all but the first have the same.
        total += (first - last) / (depth - 2) / seeds
    return math.exp(total)


@pytest.mark.parametrize(("name", "batch"), [("relu", 16), ("relu", 128), ("tanh", 128)])
def test_nets_with_batch_norm_follow(name: str, batch: int) -> None:
    assert _measured(name, batch, nn.BatchNorm1d) == pytest.approx(
        batch_norm(name, batch), rel=0.03
    )


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_nets_with_layer_norm_follow(name: str) -> None:
    assert _measured(name, 16, nn.LayerNorm) == pytest.approx(layer_norm(name), rel=0.03)


@pytest.mark.parametrize(
    ("grid", "averaged", "limit"),
    [(16, 0.9634, 0.9774), (8, 0.9104, 0.9212), (4, 0.7572, 0.7616)],
)
def test_zero_padding(grid: int, averaged: float, limit: float) -> None:
    assert padding_factor(3, grid, 2, 19) == pytest.approx(averaged, abs=6e-5)
    assert padding_factor(3, grid) == pytest.approx(limit, abs=6e-5)
    closed = (1 + 2 * math.cos(math.pi / (grid + 1))) / 3
    assert padding_factor(3, grid, 3) == pytest.approx(closed**3)


def test_zero_padding_of_a_convolution() -> None:
    """The mean square of a backward convolution with random weights, by one layer and kernel 5."""
    source = torch.Generator().manual_seed(0)
    channels, grid = 200, 6
    weight = torch.randn(channels, channels, 5, generator=source) / (5 * channels) ** 0.5
    given = torch.randn(8, channels, grid, generator=source)
    back = nn.functional.conv_transpose1d(given, weight, padding=2)
    kept = (back.square().sum() / given.square().sum()).item()
    assert padding_factor(5, grid, 1, 1) == pytest.approx(0.8)
    assert kept == pytest.approx(padding_factor(5, grid, 1, 1), rel=0.03)
    assert padding_factor(1, grid) == 1


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="batch: of 3 samples"):
        batch_norm("relu", 3)
    with pytest.raises(ConfigError, match="kernel: 0 is no size"):
        padding_factor(0, 8)
    with pytest.raises(ConfigError, match="scale: inf"):
        residual("relu", 2.0, scale=math.inf)
    with pytest.raises(ConfigError, match="does not vary"):
        batch_norm(lambda x: x * 0)
