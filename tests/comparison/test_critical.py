"""Critical points and lines against printed ones, and against the definition."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.comparison.critical import critical, critical_line
from gradscope.comparison.meanfield import moments, predict
from gradscope.errors import ConfigError

BIASES = (1e-5, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
NAN = math.nan
LINES = {
    "tanh": (1.03952, 1.42421, 1.76095, 1.98607, 2.28515, 2.84317, 3.44321),
    "erf": (0.81635, 1.11428, 1.37584, 1.55212, 1.78818, 2.23366, 2.71838),
    "hardtanh": (1.00016, 1.05206, 1.16554, 1.26341, 1.41062, 1.71719, 2.07271),
    "softsign": (1.18815, 2.28877, 3.14125, 3.69413, 4.41531, 5.73146, 7.11514),
    "gelu": (3.95991, 2.98280, 2.30252, 2.07668, 1.97067, 1.96122),
    "silu": (3.97482, 3.31259, 2.72861, 2.43955, 2.18669, 1.99747, 1.96704),
    "mish": (2.76179, 2.37460, 2.10480, 2.00685, 1.94971, 1.94276, 1.96219),
    "elu": (1.07449, 1.38333, 1.53372, 1.60674, 1.68184, 1.77848, 1.84410),
    "selu": (0.52551, 0.76023, 0.90177, 0.98033, 1.07036, 1.20589, 1.31771),
    "relu": (NAN,) * 7,
    "softplus": (NAN,) * 7,
}
# How many of the above, from the left, have a q that runs away.
UNSTABLE = {"gelu": 4, "silu": 6, "mish": 3}


@pytest.mark.parametrize("name", LINES)
def test_critical_lines(name: str) -> None:
    expected = LINES[name]
    line = critical_line(name, BIASES[: len(expected)])
    assert line.weight_variance == pytest.approx(expected, abs=6e-6, nan_ok=True)
    runs_away = np.array([i < UNSTABLE.get(name, 0) for i in range(len(expected))])
    assert ((line.stability > 1) == runs_away).all()


def test_the_line_is_where_theory_keeps_the_gradient() -> None:
    line = critical_line("tanh", [[0.01, 0.3], [1.0, 3.0]])
    assert line.q.shape == (2, 2)
    for bias, weight, q in zip(
        line.bias_variance.flat, line.weight_variance.flat, line.q.flat, strict=True
    ):
        found = predict("tanh", weight, bias)
        assert found.q_star == pytest.approx(q, rel=1e-9)
        assert found.chi_star == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "weight", "bias", "q"),
    [
        ("gelu", 1.98305826, 0.17292239, (3 + math.sqrt(17)) / 2),
        ("silu", 1.98800468, 0.55514317, 14.32017362),
        ("mish", 2.01352407, 0.09452179, 1.670169),
    ],
)
def test_half_stable_points(name: str, weight: float, bias: float, q: float) -> None:
    found = critical(name)
    assert found.weight_variance == pytest.approx(weight, abs=6e-9)
    assert found.bias_variance == pytest.approx(bias, abs=6e-9)
    assert found.q == pytest.approx(q, abs=6e-7)
    there = moments(name, found.q)
    assert there.dphi2 == pytest.approx(there.slope, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("relu", 2),
        ("leaky_relu", 2 / 1.0001),
        ("linear", 1),
        ("tanh", 1),
        ("erf", math.pi / 4),
        ("hardtanh", 1),
        ("softsign", 1),
        ("elu", 1),
        # 2 / (the squares of both slopes at 0): SELU is a leaky line there.
        ("selu", 2 / (1.0507009873554805**2 * (1 + 1.6732632423543772**2))),
    ],
)
def test_critical_without_bias(name: str, weight: float) -> None:
    found = critical(name)
    assert found.weight_variance == pytest.approx(weight, rel=1e-7)
    assert found.bias_variance == 0
    line = critical_line(name, 0.0)
    assert float(line.weight_variance) == found.weight_variance


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sigmoid", "of 103 and more"), ("softplus", "negative bias"), ("relu_squared", "unstable")],
)
def test_no_critical_point_has_a_reason(name: str, reason: str) -> None:
    found = critical(name)
    assert found.weight_variance is None
    assert math.isnan(found.q)
    assert reason in found.reason


def _scaled_swish(values: Tensor) -> Tensor:
    return 2 * torch.nn.functional.silu(values)


def test_a_function_of_ones_own() -> None:
    """Twice the function: a quarter of the weight variance, the same q and bias variance."""
    once, twice = critical("silu"), critical(_scaled_swish)
    assert once.weight_variance is not None
    assert twice.weight_variance == pytest.approx(once.weight_variance / 4, rel=1e-9)
    assert (twice.bias_variance, twice.q) == pytest.approx((once.bias_variance, once.q), rel=1e-7)
    assert critical("hardswish").weight_variance == pytest.approx(1.97, abs=0.01)


def test_half_stable_depth_is_kept() -> None:
    found = critical("gelu")
    assert found.weight_variance is not None
    deep = predict("gelu", found.weight_variance, found.bias_variance, q0=found.q, depth=100)
    assert deep.chi == pytest.approx([1.0] * 100, abs=1e-8)
    assert deep.q_star == pytest.approx(found.q)


def test_bad_bias_variances() -> None:
    with pytest.raises(ConfigError, match="bias_variances"):
        critical_line("tanh", [0.1, -0.1])
