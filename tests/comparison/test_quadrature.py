"""Averages over a Gaussian against closed forms and scipy's quadrature."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from scipy.special import erf, expit
from torch import Tensor, nn

from gradscope.comparison.activation import ACTIVATIONS, Activation, activation_called
from gradscope.comparison.meanfield import moments
from gradscope.comparison.quadrature import find_kinks

VARIANCES = (1e-6, 0.03, 1.0, 2.7, 40.0)
Scalar = Callable[[float], float]

_ALPHA, _LAMBDA = 1.6732632423543772, 1.0507009873554805


def _density(x: float) -> float:
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _elu(x: float) -> float:
    return x if x > 0 else math.expm1(x)


def _elu_slope(x: float) -> float:
    return 1.0 if x > 0 else math.exp(x)


def _gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_tanh_slope(x: float) -> float:
    c = math.sqrt(2 / math.pi)
    t = math.tanh(c * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x**2)


def _mish_slope(x: float) -> float:
    t = math.tanh(_softplus(x))
    return float(t + x * (1 - t * t) * expit(x))


# Function, derivative, kinks: written apart from torch.
BY_HAND: dict[str, tuple[Scalar, Scalar, tuple[float, ...]]] = {
    "elu": (_elu, _elu_slope, (0.0,)),
    "celu": (_elu, _elu_slope, (0.0,)),
    "selu": (
        lambda x: _LAMBDA * (x if x > 0 else _ALPHA * math.expm1(x)),
        lambda x: _LAMBDA * (1.0 if x > 0 else _ALPHA * math.exp(x)),
        (0.0,),
    ),
    "gelu": (
        lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
        lambda x: (1 + math.erf(x / math.sqrt(2))) / 2 + x * _density(x),
        (),
    ),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope, ()),
    "silu": (
        lambda x: float(x * expit(x)),
        lambda x: float(expit(x) * (1 + x * expit(-x))),
        (),
    ),
    "mish": (lambda x: x * math.tanh(_softplus(x)), _mish_slope, ()),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2, ()),
    "sigmoid": (lambda x: float(expit(x)), lambda x: float(expit(x) * expit(-x)), ()),
    "hardtanh": (
        lambda x: min(max(x, -1.0), 1.0),
        lambda x: 1.0 if abs(x) < 1 else 0.0,
        (-1.0, 1.0),
    ),
    "hardswish": (
        lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
        lambda x: 0.0 if x < -3 else 1.0 if x > 3 else (2 * x + 3) / 6,
        (-3.0, 3.0),
    ),
    "softplus": (_softplus, lambda x: float(expit(x)), ()),
    "relu_squared": (lambda x: max(x, 0.0) ** 2, lambda x: 2 * max(x, 0.0), (0.0,)),
    "softsign": (lambda x: x / (1 + abs(x)), lambda x: (1 + abs(x)) ** -2.0, (0.0,)),
}


def _average(function: Scalar, kinks: tuple[float, ...], q: float) -> float:
    """By scipy over pieces between kinks and whole deviations."""
    deviation = math.sqrt(q)
    inside = [k / deviation for k in kinks if abs(k) < 12 * deviation]
    # Near 0 the functions vary on their own scale.
    fine = [x / deviation for x in range(-10, 11) if abs(x) < 12 * deviation]
    ends = sorted({*inside, *fine, *(float(z) for z in range(-12, 13, 2))})
    pieces = (
        quad(lambda z: function(deviation * z) * _density(z), a, b, epsabs=1e-15, epsrel=1e-12)[0]
        for a, b in pairwise(ends)
    )
    return float(sum(pieces))


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("q", VARIANCES)
def test_moments_are_those_of_scipy(name: str, q: float) -> None:
    function, slope, kinks = BY_HAND[name]
    found = moments(name, q)

    def average(of: Scalar) -> float:
        return _average(of, kinks, q)

    assert found.phi == pytest.approx(average(function), rel=1e-8, abs=1e-12)
    assert found.phi2 == pytest.approx(average(lambda x: function(x) ** 2), rel=1e-8)
    assert found.dphi == pytest.approx(average(slope), rel=1e-8)
    assert found.dphi2 == pytest.approx(average(lambda x: slope(x) ** 2), rel=1e-8)
    assert found.dphi4 == pytest.approx(average(lambda x: slope(x) ** 4), rel=1e-8)
    # By Gauss's heat equation: the derivative in q is half the mean of the second one.
    wide = average(lambda x: function(x) ** 2 * (x * x / q - 1) / (2 * q))
    assert found.slope == pytest.approx(wide, rel=1e-6, abs=1e-9 / q)


def test_every_activation_is_tested() -> None:
    assert {*BY_HAND, "relu", "leaky_relu", "linear", "erf"} == {*ACTIVATIONS}


@pytest.mark.parametrize("q", [1e-200, *VARIANCES, 1e200])
@pytest.mark.parametrize(("name", "a"), [("relu", 0.0), ("leaky_relu", 0.01), ("linear", 1.0)])
def test_piecewise_lines_have_closed_forms(name: str, a: float, q: float) -> None:
    found = moments(name, q)
    assert found.phi2 == pytest.approx(q * (1 + a * a) / 2, rel=1e-12)
    assert found.dphi2 == pytest.approx((1 + a * a) / 2, rel=1e-12)
    assert found.phi == pytest.approx((1 - a) * math.sqrt(q / 2 / math.pi), rel=1e-12, abs=1e-99)
    assert found.phi_ddphi == pytest.approx(0, abs=1e-12)
    assert found.kurtosis == pytest.approx(2 * (1 + a**4) / (1 + a * a) ** 2, rel=1e-12)


@pytest.mark.parametrize("q", [1e-200, *VARIANCES])
def test_erf_has_closed_forms(q: float) -> None:
    """Williams 1997."""
    found = moments("erf", q)
    assert found.phi2 == pytest.approx(2 / math.pi * math.asin(2 * q / (1 + 2 * q)), rel=1e-12)
    assert found.dphi2 == pytest.approx(4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-12)
    # The derivative of the arcsine.
    slope = 4 / math.pi / ((1 + 2 * q) * math.sqrt(1 + 4 * q))
    assert found.slope == pytest.approx(slope, rel=1e-12)


def _shifted_ramp(values: Tensor) -> Tensor:
    return values.clamp(min=-0.7311).minimum(torch.tensor(1.3, dtype=values.dtype))


def _shrink(values: Tensor) -> Tensor:
    return nn.functional.softshrink(values, 0.37)


def _in_place(values: Tensor) -> Tensor:
    return values.relu_()


def test_kinks_are_found_wherever_they_are() -> None:
    assert find_kinks(activation_called(_shifted_ramp)) == pytest.approx((-0.7311, 1.3), abs=1e-9)
    assert find_kinks(activation_called(_shrink)) == pytest.approx((-0.37, 0.37), abs=1e-9)
    for name, known in ACTIVATIONS.items():
        assert known.kinks is not None
        assert find_kinks(Activation(name, known.function)) == pytest.approx(known.kinks, abs=1e-9)


@pytest.mark.parametrize("q", [0.02, 1.0, 9.0])
def test_a_function_with_kinks(q: float) -> None:
    found = moments(_shifted_ramp, q)
    # Of a uniform slope: a probability.
    low, high = (float(erf(x / math.sqrt(2 * q))) / 2 for x in (-0.7311, 1.3))
    assert found.dphi2 == pytest.approx(high - low, rel=1e-9)
    square = _average(lambda x: min(max(x, -0.7311), 1.3) ** 2, (-0.7311, 1.3), q)
    assert found.phi2 == pytest.approx(square, rel=1e-9)
    ripple = moments(torch.sin, q)
    assert ripple.phi2 == pytest.approx((1 - math.exp(-2 * q)) / 2, rel=1e-9)
    assert ripple.dphi2 == pytest.approx((1 + math.exp(-2 * q)) / 2, rel=1e-9)


def _in_single_precision(values: Tensor) -> Tensor:
    return values.float().tanh()


def test_functions_that_are_hard_to_differentiate() -> None:
    """A second derivative that is zero by construction; jumps that are rounding."""
    assert find_kinks(activation_called(torch.abs)) == pytest.approx((0.0,), abs=1e-9)
    assert moments(torch.abs, 3.0).phi2 == pytest.approx(3.0)
    assert not find_kinks(activation_called(_in_single_precision))
    exact = moments("tanh", 1.0)
    assert moments(_in_single_precision, 1.0).dphi2 == pytest.approx(exact.dphi2, rel=1e-6)


def test_modules_and_functions_in_place() -> None:
    assert moments(_in_place).dphi2 == pytest.approx(0.5)
    module = nn.PReLU(init=0.25)
    assert moments(module).dphi2 == pytest.approx((1 + 0.25**2) / 2)
    with torch.no_grad():
        module.weight.fill_(0.5)
    assert moments(module).dphi2 == pytest.approx((1 + 0.5**2) / 2)
    assert module.weight.dtype == torch.float32
