"""Mean-field theory against closed forms, printed tables and real nets."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.comparison.activation import activation_called
from gradscope.comparison.critical import critical
from gradscope.comparison.meanfield import gain, log_variance, moments, plug_in, predict
from gradscope.comparison.quadrature import Expectations, Moments
from gradscope.errors import ConfigError, ConfigTypeError
from tests.comparison.deep import measure, noise


def test_a_variance_of_nothing_is_a_limit() -> None:
    found = predict("selu", 1 / 3, depth=3)
    assert found.q_star == 0
    kept = 1.0507009873554805**2 * (1 + 1.6732632423543772**2) / 2
    assert found.chi_star == pytest.approx(kept / 3, rel=1e-12)
    assert predict("sigmoid", 0.0, depth=2).q.tolist() == [1.0, 0.0]


NAN, INF = math.nan, math.inf

# σ_w², σ_b², q*, χ, stability, ξ of the gradient: computed apart, with Gauss-Hermite as a check.
FIXED_POINTS = [
    ("relu", 2, 0, NAN, 1, 1, INF),
    ("relu", 1, 0, 0, 0.5, 0.5, 1.443),
    ("relu", 1 / 3, 0, 0, 1 / 6, 1 / 6, 0.558),
    ("tanh", 1, 0, 0, 1, 1, INF),
    ("tanh", 1 / 3, 0, 0, 1 / 3, 1 / 3, 0.910),
    ("tanh", 25 / 9, 0, 1.178480, 1.209831, 0.43090, 5.250),
    ("tanh", 2, 0, 0.617965, 1.105529, 0.55252, 9.968),
    ("tanh", 1, 0.05, 0.193593, 0.759032, 0.56428, 3.627),
    ("tanh", 1.76, 0.05, 0.569463, 0.999796, 0.51831, 4912),
    ("tanh", 2.5, 0.05, 1.06396, 1.133516, 0.42846, 7.979),
    ("tanh", 4, 0.05, 2.19549, 1.342402, 0.31820, 3.396),
    ("erf", math.pi / 4, 0, 0, 1, 1, INF),
    ("erf", 1, 0, 0.141924, 1.016903, 0.79207, 59.66),
    ("erf", 2, 0.05, 0.965955, 1.154653, 0.39382, 6.954),
    ("hardtanh", 1, 0, 0, 1, 1, INF),
    ("hardtanh", 25 / 9, 0, 1.71001, 1.543222, 0.27804, 2.305),
    ("sigmoid", 1 / 3, 0, 0.0850338, 0.020008, 0.01921, 0.256),
    ("sigmoid", 1, 0, 0.264687, 0.055721, 0.04951, 0.346),
    ("sigmoid", 16, 0, 5.8554, 0.398879, 0.12434, 1.088),
    ("softsign", 1, 0, 0, 1, 1, INF),
    ("gelu", 2, 0, 0, 0.5, 0.5, 1.443),
    ("silu", 2, 0, 0, 0.5, 0.5, 1.443),
    ("mish", 2, 0, 0, 0.72, 0.72, 3.044),
    ("elu", 1, 0, 0, 1, 1, INF),
    ("elu", 1.55, 0, 0.996936, 1.035857, 0.89094, 28.39),
    ("elu", 2, 0, NAN, 1, 1, INF),
    ("selu", 1, 0, 1, 1.071575, 0.78265, 14.466),
    ("selu", 9 / 16, 0, 0.0230338, 1.003670, 0.92354, 273),
    ("selu", 1 / 3, 0, 0, 0.69915, 0.69915, 2.794),
    ("selu", 2, 0, NAN, 1.1041, 1.104, 10.1),
    ("softplus", 1, 0, 0.856305, 0.288722, 0.45052, 0.805),
]


@pytest.mark.parametrize(
    ("name", "variances", "expected"), [(row[0], row[1:3], row[3:]) for row in FIXED_POINTS]
)
def test_fixed_points(
    name: str, variances: tuple[float, float], expected: tuple[float, ...]
) -> None:
    q_star, chi, stability, xi = expected
    found = predict(name, *variances)
    assert found.q_star == pytest.approx(q_star, rel=1e-5, nan_ok=True)
    assert found.chi_star == pytest.approx(chi, rel=2e-4)
    assert found.stability == pytest.approx(stability, rel=1e-4, abs=6e-6)
    assert found.xi_gradient == pytest.approx(xi, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "weight", "c_star", "xi"),
    [("tanh", 2.5, 0.4468, 11.80), ("tanh", 4, 0.1651, 6.980), ("erf", 2, None, 10.19)],
)
def test_chaotic_phase(name: str, weight: float, c_star: float | None, xi: float) -> None:
    found = predict(name, weight, 0.05)
    assert found.xi_correlation == pytest.approx(xi, rel=1e-3)
    assert found.trainable_depth == 6 * found.xi_correlation
    if c_star is not None:
        assert found.correlation_star == pytest.approx(c_star, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "weight", "bias"),
    [("erf", 2, 0.05), ("erf", 1.4, 0.05), ("hardtanh", 1.3, 0.1), ("selu", 9 / 16, 0)],
)
def test_the_correlation_map_rests_at_its_fixed_point(
    name: str, weight: float, bias: float
) -> None:
    """On a fine grid over both Gaussians, without the series; erf has a closed form besides."""
    found = predict(name, weight, bias)
    c, q = found.correlation_star, found.q_star
    assert 0 < c < 1
    z = np.linspace(-9, 9, 3001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    # u, v = √q (√(1+c) z ± √(1−c) z′) / √2: the narrow direction has its own grid.
    wide, narrow = math.sqrt(q * (1 + c) / 2) * z, math.sqrt(q * (1 - c) / 2) * z[::4]
    u = wide[:, None] + narrow
    v = wide[:, None] - narrow
    phi = activation_called(name)
    values = [phi(torch.from_numpy(x)).numpy() for x in (u, v)]
    weights = density[:, None] * density[::4] * 4
    # E (φ(u) − φ(v))² / 2 is q (1 − c) where c rests.
    apart = weight * float((weights * (values[0] - values[1]) ** 2).sum()) / 2
    assert apart == pytest.approx(q * (1 - c), rel=2e-3)
    if name == "erf":
        kernel = 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q))
        assert weight * kernel + bias == pytest.approx(q * c, rel=1e-9)
        slope = 4 / math.pi / math.sqrt((1 + 2 * q) ** 2 - (2 * q * c) ** 2)
        assert found.xi_correlation == pytest.approx(-1 / math.log(weight * slope), rel=1e-8)


def test_layers_follow_the_recursion() -> None:
    found = predict("erf", 1.4, 0.1, q0=3.0, depth=6)
    q = 3.0
    for layer in range(6):
        assert found.q[layer] == pytest.approx(q, rel=1e-12)
        assert found.chi[layer] == pytest.approx(1.4 * 4 / math.pi / math.sqrt(1 + 4 * q))
        q = 1.4 * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)) + 0.1
    assert found.log_gain == pytest.approx(float(np.log(found.chi).sum()))
    assert found.growth == pytest.approx(np.sqrt(found.chi))


def test_relu_at_he_keeps_everything() -> None:
    found = predict("relu", 2.0, q0=0.3, depth=40)
    assert found.q == pytest.approx([0.3] * 40)
    assert found.growth == pytest.approx([1.0] * 40)
    assert math.isnan(found.q_star)
    assert found.remark == "every q stays where it is"


def test_remarks_say_where_limits_mislead() -> None:
    assert "has not reached 0" in predict("tanh", 1.0).remark
    assert "grows without bound" in predict("elu", 2.0).remark
    assert "vanishes" in predict("tanh", 1 / 3).remark
    assert not predict("tanh", 2.0).remark
    for unsteady in ("gelu", "mish"):
        assert not predict(unsteady, 2.0, q0=2.0).steady
        assert "plug in" in predict(unsteady, 2.0, q0=2.0).remark
    assert predict("silu", 2.0, q0=2.0).steady


def test_the_way_decides_where_q_settles() -> None:
    """GELU has an unstable point between nothing and no bound."""
    assert predict("gelu", 2.2, 0.0, q0=0.01).q_star == 0
    assert math.isnan(predict("gelu", 2.2, 0.0, q0=10.0).q_star)


def test_extreme_variances_do_not_break() -> None:
    """A standard normal weight has σ_w² = fan-in; relu² explodes doubly."""
    deep = predict("relu", 256.0, depth=100)
    assert deep.q[-1] == pytest.approx(128.0**99, rel=1e-9)
    assert deep.chi == pytest.approx([128.0] * 100)
    assert predict("relu_squared", 256.0).q[-1] == INF
    tiny = predict("tanh", 1e-4, depth=100)
    assert tiny.chi[-1] == pytest.approx(1e-4)


def test_nothing_around_is_changed() -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        quiet = predict(lambda x: x.tanh() * 1.1, 2.0)
    with torch.inference_mode():
        inferred = predict(lambda x: x.tanh() * 1.1, 2.0)
    assert quiet.chi.tolist() == inferred.chi.tolist()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tanh", 1.5925), ("gelu", 1.5335), ("sigmoid", 1.8462), ("selu", 1.0), ("relu", 2**0.5)],
)
def test_gain(name: str, expected: float) -> None:
    assert gain(name) == pytest.approx(expected, abs=5e-5)


def test_plug_in_and_finite_width() -> None:
    assert plug_in([1.0, 2.0], [0.5, 0.25]).tolist() == [0.5, 0.5]
    relu = predict("relu", 2.0, depth=49)
    # Hanin & Nica: 5 Σ 1/n.
    assert log_variance(relu.kurtosis, 64) == pytest.approx(5 * 49 / 64)
    assert log_variance([2.0, 2.0], [64, 128]) == pytest.approx(5 / 64 + 5 / 128)
    assert log_variance([1.0], [10]) == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="0 is no width"):
        log_variance([1.0], [0])
    with pytest.raises(ConfigError, match="negative"):
        plug_in(-1.0, [0.5])


def _overflowing_mish(values: Tensor) -> Tensor:
    return values * torch.tanh(torch.log(1 + torch.exp(values)))


def test_functions_that_overflow() -> None:
    """Beyond 709 the exponential is infinite."""
    assert predict(_overflowing_mish, 1.9).chi == pytest.approx(predict("mish", 1.9).chi)
    far = predict(_overflowing_mish, 300.0)
    assert np.isnan(far.chi[-1])
    assert "is NaN" in far.remark
    exploded = predict(torch.exp, 1.0)
    assert exploded.q[-1] == INF
    assert math.isnan(exploded.q_star)
    # φ = φ′ = φ″: the mean square e^(2q) is exact as long as it is seen.
    assert moments(torch.exp, 4.0).dphi2 == pytest.approx(math.exp(8), rel=1e-10)
    assert moments(torch.exp, 60.0).phi2 == INF
    assert critical(torch.exp).weight_variance is None


def _not_a_number(values: Tensor) -> Tensor:
    return (values + 30).sqrt()


def _constant(values: Tensor) -> Tensor:
    return torch.ones_like(values)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"weight_variance: -1\.0 is no variance"):
        predict("tanh", -1.0)
    with pytest.raises(ConfigError, match="bias_variance: nan"):
        predict("tanh", 1.0, NAN)
    with pytest.raises(ConfigError, match="q0: 0"):
        predict("tanh", 1.0, q0=0.0)
    with pytest.raises(ConfigError, match="depth: 0 layers"):
        predict("tanh", 1.0, depth=0)
    with pytest.raises(ConfigTypeError, match=r"depth: 2\.5"):
        predict("tanh", 1.0, depth=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="weight_variance: '1' is a str"):
        predict("tanh", "1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nearest name is 'tanh'"):
        predict("tahn", 1.0)
    with pytest.raises(ConfigError, match="_not_a_number is NaN at -"):
        predict(_not_a_number, 1.0)
    with pytest.raises(ConfigError, match="no derivative of _constant"):
        predict(_constant, 1.0)


def test_a_prediction_averages_once_per_layer_and_few_times_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What belongs to the activation alone is known from the first prediction on.
    predict("tanh", 2.0, 0.05)
    asked: list[float] = []
    average = Expectations.at

    def counting(table: Expectations, q: float) -> Moments:
        asked.append(q)
        return average(table, q)

    monkeypatch.setattr(Expectations, "at", counting)
    predict("tanh", 3.0, 0.05, depth=50)
    assert 50 <= len(asked) <= 70


@pytest.mark.parametrize(
    ("name", "weight"), [("relu", 2.0), ("tanh", 25 / 9), ("gelu", 1.0), ("linear", 1.0)]
)
def test_nets_of_width_256_follow(name: str, weight: float) -> None:
    depth, width, seeds = 20, 256, 12
    activation = activation_called(name)
    theory = predict(activation, weight, q0=weight, depth=depth - 1)
    logs = [
        measure(activation, weight, 0.0, noise(width, depth, seed)).log_chi.sum(0).mean()
        for seed in range(seeds)
    ]
    spread = log_variance(theory.kurtosis, width)
    expected = theory.log_gain - spread / 2
    # The formula's spread is of one input; that of tanh is half as much again.
    error = 1.3 * math.sqrt(spread / seeds)
    assert np.mean(logs) == pytest.approx(expected, abs=3 * error)
    # That is a test: a factor of 2 % of the norm per layer would show.
    assert 3 * error < 2 * 0.02 * (depth - 1)
