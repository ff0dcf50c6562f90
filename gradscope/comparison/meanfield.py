"""How variance and gradient go through a deep fully connected net of great width."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar

from gradscope.comparison.activation import Activation, ActivationFunction, activation_called
from gradscope.comparison.correlation import chaotic
from gradscope.comparison.quadrature import F64, Expectations, Moments, expectations
from gradscope.comparison.quadrature import moments as _moments
from gradscope.errors import ConfigError, ConfigTypeError

Recursion = Callable[[Moments], float]
Excess = Callable[[float], float]

DEPTH = 50

# Relative to q. Quadrature is good to 1e-14; a variance may come from a printed table.
_EXACT = 1e-12
_FIXED = 1e-8
# Two fixed points that nearly meet hide between points of the grid.
_NEARLY = 1e-3
# Less of a dip is rounding: of ReLU all points of the grid are alike.
_DIP = 1 - 1e-9
# The layers' last χ against that at q*, above which the limit misleads.
_SETTLED = 0.01
# With He and inputs of variance 1, GELU has 8.9 and Mish 6.2, and theory alone misleads; SiLU
# has 3.3, and it doesn't. ReLU has 1, tanh and its like never more.
_AMPLIFIED = 4.0
# Where "q grows without bound" is looked at.
_FAR = (1e100, 1e200)


@dataclass(frozen=True, eq=False, slots=True)
class MeanField:
    """What theory says of L equal layers; χ is the ratio of SQUARED gradient norms per layer.

    q: (L,) variances of the pre-activations. chi: (L,), E‖∂/∂h^l‖² = χ^l E‖∂/∂h^(l+1)‖².
    kurtosis: (L,), E φ′⁴ / (E φ′²)². q_star: where q goes from q0; NaN where it grows without
    bound or every q stays. stability: ∂q^(l+1)/∂q^l at it, attracting below 1. chi_star: χ at it;
    where q grows, the limit. correlation_star, xi_correlation: where the correlation of two
    inputs goes and in how many layers; with q* = 0 that of their difference, which goes with q.
    xi_gradient: 1 / |ln χ|. amplification: the most by which a relative deviation of the first q
    grows. remark: what to know before reading the limits, or "".
    """

    activation: str
    weight_variance: float
    bias_variance: float
    q: F64
    chi: F64
    kurtosis: F64
    q_star: float
    stability: float
    chi_star: float
    correlation_star: float
    xi_correlation: float
    xi_gradient: float
    amplification: float
    remark: str

    @property
    def growth(self) -> F64:
        """√χ: the factor of the gradient's NORM per layer, towards the input."""
        return np.sqrt(self.chi)

    @property
    def steady(self) -> bool:
        """Whether a net of finite width keeps to these q; else `plug_in` what was measured."""
        return self.amplification <= _AMPLIFIED

    @property
    def log_gain(self) -> float:
        """Σ ln χ: the logarithm of the squared norm's factor over all layers."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.chi).sum())

    @property
    def trainable_depth(self) -> float:
        """6 ξ, in layers (Schoenholz et al. 2017)."""
        return 6 * self.xi_correlation


def predict(
    activation: str | ActivationFunction | Activation,
    weight_variance: float,
    bias_variance: float = 0.0,
    *,
    q0: float = 1.0,
    depth: int | None = None,
) -> MeanField:
    """Mean-field theory of a deep fully connected net at infinite width.

    weight_variance: σ_w², fan-in times the variance of a weight. q0: the variance of the FIRST
    PRE-ACTIVATION, σ_w² ⟨x²⟩ + σ_b². depth: layers, 50 by default; n layers have n − 1 ratios χ.
    Raises ConfigError or ConfigTypeError. Poole et al. 2016, Schoenholz et al. 2017.
    """
    known = activation_called(activation)
    check(weight_variance=weight_variance, bias_variance=bias_variance)
    layers = checked_depth(depth)
    checked_variance(q0)
    table = expectations(known)
    q, found = layerwise(table, q0, layers, lambda m: weight_variance * m.phi2 + bias_variance)
    chi = weight_variance * np.array([m.dphi2 for m in found])
    q_star, at = _settles(table, weight_variance, bias_variance, q0)
    amplification = _amplification(found, weight_variance)
    chi_star = weight_variance * at.dphi2 if at else math.nan
    stability = weight_variance * at.slope if at else math.nan
    c_star, xi_c = _correlation(known, weight_variance, q_star, chi_star)
    return MeanField(
        known.name,
        float(weight_variance),
        float(bias_variance),
        q,
        chi,
        np.array([m.kurtosis for m in found]),
        q_star,
        stability,
        chi_star,
        c_star,
        xi_c,
        scale(chi_star),
        amplification,
        _remark(found, at, weight_variance, q_star, amplification),
    )


def moments(activation: str | ActivationFunction | Activation, q: float = 1.0) -> Moments:
    """The averages of φ, φ′ and their powers over N(0, q). Raises ConfigError."""
    checked_variance(q)
    return _moments(activation_called(activation), q)


def gain(activation: str | ActivationFunction | Activation) -> float:
    """1 / √E φ(z)², z ~ N(0, 1): times 1/√fan-in, a weight's deviation that keeps variance 1.

    It keeps the gradient, too, only for a line and (leaky) ReLU. Raises ConfigError.
    """
    known = activation_called(activation)
    phi2 = _moments(known, 1.0).phi2
    if not 0 < phi2 < math.inf:
        message = f"activation: {known.name} has no gain: its mean square is {phi2:g}"
        raise ConfigError(message)
    return 1 / math.sqrt(phi2)


def plug_in(weight_variance: ArrayLike, mean_dphi2: ArrayLike) -> F64:
    """χ per layer from the mean φ′² that was measured there: right also where q is not settled.

    weight_variance: of all layers or per layer, better measured (‖W‖² over its rows) than meant.
    """
    weights = np.asarray(weight_variance, np.float64)
    squares = np.asarray(mean_dphi2, np.float64)
    if (weights < 0).any() or (squares < 0).any():
        message = "plug_in: variances and mean squares can't be negative"
        raise ConfigError(message)
    return weights * squares


def log_variance(kurtosis: ArrayLike, widths: ArrayLike) -> float:
    """Variance of ln of the squared norm's factor over nets: Σ (3κ − 1) / n, 5 Σ 1/n for ReLU.

    Their mean of logarithms lies half of it below Σ ln χ. A floor where q itself fluctuates:
    tanh and SELU have 1.4 times it. Hanin & Nica 2020 for ReLU.
    """
    spread, units = np.broadcast_arrays(
        np.asarray(kurtosis, np.float64), np.asarray(widths, np.float64)
    )
    if not (units > 0).all():
        message = f"widths: {units[~(units > 0)].flat[0]:g} is no width; give units per layer"
        raise ConfigError(message)
    return float(((3 * spread - 1) / units).sum())


def scale(factor: float) -> float:
    """In how many layers a factor per layer makes e: infinite where it is 1."""
    if factor == 0:
        return 0.0
    logarithm = abs(math.log(factor)) if factor < math.inf else math.inf
    return math.inf if logarithm < _EXACT else 1 / logarithm


def layerwise(
    table: Expectations, q0: float, layers: int, onward: Recursion
) -> tuple[F64, Sequence[Moments]]:
    """The q of every layer, and the averages there."""
    found = [table.at(float(q0))]
    while len(found) < layers:
        found.append(table.at(onward(found[-1])))
    return np.array([m.q for m in found]), found


def check(**variances: float) -> None:
    """That each is a finite number that is not negative. Raises ConfigError."""
    for name, value in variances.items():
        _check_number(name, value)
        if not 0 <= value < math.inf:
            message = f"{name}: {value!r} is no variance; give a finite number, 0 or more"
            raise ConfigError(message)


def checked_variance(q: float, name: str = "q0") -> None:
    """That a Gaussian has this variance. Raises ConfigError."""
    _check_number(name, q)
    if not 0 < q < math.inf:
        message = f"{name}: {q!r} is no variance of a pre-activation; give a finite number above 0"
        raise ConfigError(message)


def checked_depth(depth: int | None) -> int:
    """The number of layers. Raises ConfigError."""
    if depth is None:
        return DEPTH
    if not isinstance(depth, Integral) or isinstance(depth, bool):
        message = f"depth: {depth!r} is no number of layers; give an integer, 1 or more"
        raise ConfigTypeError(message)
    if depth < 1:
        message = f"depth: {depth} layers are none; give 1 or more"
        raise ConfigError(message)
    return int(depth)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        message = f"{name}: {value!r} is a {type(value).__name__}; give a number"
        raise ConfigTypeError(message)


def _settles(
    table: Expectations, weight_variance: float, bias_variance: float, q0: float
) -> tuple[float, Moments | None]:
    """Where q goes, and the averages there; those far out where it grows without bound."""

    def excess(q: float) -> float:
        return (weight_variance * table.at(q).phi2 + bias_variance) / q - 1

    start = excess(q0)
    if abs(start) < _EXACT and max(abs(excess(q0 / 2)), abs(excess(2 * q0))) < _EXACT:
        return math.nan, table.at(q0)
    if abs(start) < _FIXED:
        return q0, table.at(q0)
    squares, grid = table.curves[1], table.curves[0]
    relative = (weight_variance * squares + bias_variance) / grid - 1
    ahead = grid > q0 if start > 0 else grid < q0
    points, values = grid[ahead], relative[ahead]
    if start < 0:
        points, values = points[::-1], values[::-1]
    points, values = np.concatenate([[q0], points]), np.concatenate([[start], values])
    root = _first_root(excess, points, values * np.sign(start), np.sign(start))
    if root is not None:
        return root, table.at(root)
    if start > 0:
        near, far = (table.at(q) for q in _FAR)
        same = math.isclose(near.dphi2, far.dphi2, rel_tol=1e-6)
        return math.nan, far if same else None
    if bias_variance > 0:
        root = float(brentq(excess, bias_variance, points[-1]))
        return root, table.at(root)
    return 0.0, table.at(0.0)


def _first_root(excess: Excess, points: F64, ahead: F64, sign: float) -> float | None:
    """The first fixed point on the way; `ahead` is positive where q moves on along `points`.

    A recursion that rises with q can't step over a fixed point.
    """
    for index in range(1, points.size):
        if ahead[index] < -_EXACT:
            return float(
                brentq(excess, *sorted(points[index - 1 : index + 1]), xtol=1e-300, rtol=1e-14)
            )
        within = ahead[index - 1 : index + 2]
        if within.size == 3 and _EXACT < within[1] < min(_NEARLY, _DIP * min(within[::2])):  # noqa: PLR2004
            ends = sorted((points[index - 1], points[index + 1]))
            low = minimize_scalar(
                lambda q: sign * excess(q), bounds=ends, method="bounded", options={"xatol": 1e-12}
            )
            if low.fun < -_EXACT:
                pair = sorted((points[index - 1], float(low.x)))
                return float(brentq(excess, *pair, xtol=1e-300, rtol=1e-14))
            if low.fun < _FIXED:
                return float(low.x)
    return None


def _correlation(
    activation: Activation, weight_variance: float, q_star: float, chi_star: float
) -> tuple[float, float]:
    if math.isnan(chi_star):
        return math.nan, math.nan
    if chi_star <= 1 + _EXACT:
        return 1.0, scale(min(chi_star, 1.0))
    if not 0 < q_star < math.inf:
        return math.nan, math.nan
    c, slope = chaotic(activation, weight_variance, q_star)
    return c, scale(min(slope, 1.0))


def _remark(
    found: Sequence[Moments],
    at: Moments | None,
    weight_variance: float,
    q_star: float,
    amplification: float,
) -> str:
    """The most important thing that the limits don't tell."""
    if any(math.isnan(m.phi2) or math.isnan(m.dphi2) for m in found):
        return "the function or its derivative is NaN at inputs as large as q makes them"
    if math.isnan(q_star):
        stays = at is not None and at.q == found[0].q
        return "every q stays where it is" if stays else "q grows without bound: read the layers"
    if at and weight_variance * at.slope < -1:
        return "q does not settle: it swings around q*; read the layers"
    if amplification > _AMPLIFIED:
        return (
            f"q runs away from an unstable point, a deviation grows {amplification:.2g}-fold: "
            "plug in what is measured"
        )
    if at and abs(found[-1].dphi2 - at.dphi2) > _SETTLED * at.dphi2:
        towards = f"{q_star:.4g}"
        return f"q has not reached {towards} after {len(found)} layers: read them, not the limit"
    return "" if q_star else "q goes to 0: the signal vanishes with depth"


def _amplification(found: Sequence[Moments], weight_variance: float) -> float:
    """By how much a relative deviation of the first q has grown where it is largest."""
    factors = [
        weight_variance * here.slope * here.q / onward.q
        for here, onward in itertools.pairwise(found)
        if 0 < onward.q < math.inf
    ]
    return float(np.cumprod(factors).max(initial=1.0))
