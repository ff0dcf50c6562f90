"""Where a deep net neither loses nor blows up its gradient: χ = 1."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from gradscope.comparison.activation import Activation, ActivationFunction, activation_called
from gradscope.comparison.quadrature import F64, Expectations, expectations
from gradscope.errors import ConfigError

# Relative; rounding leaves 1e-15.
_EXACT = 1e-10
# Beyond, no net is trained, and what rounding leaves of q − E φ² / E φ′² may pass for a root.
_WIDEST = 1e6


@dataclass(frozen=True, slots=True)
class Critical:
    """Where χ = 1 and q is not unstable; or the reason why there is no such point.

    weight_variance: σ_w², None where there is none. bias_variance: σ_b². q: of all layers, NaN
    where any will do.
    """

    activation: str
    weight_variance: float | None
    bias_variance: float
    q: float
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class CriticalLine:
    """χ = 1 over given bias variances; NaN where there is no such weight variance.

    weight_variance, q, stability: arrays of the shape of bias_variance. With a stability above 1
    q moves away: no use in a deep net.
    """

    activation: str
    bias_variance: F64
    weight_variance: F64
    q: F64
    stability: F64


def critical(activation: str | ActivationFunction | Activation) -> Critical:
    """The critical point of an activation.

    (2 / (1 + a²), 0) for ReLU and its like; (1 / φ′(0)², 0) where φ(0) = 0 and q goes to 0, as with
    tanh; else the half-stable point, where χ = ∂q^(l+1)/∂q^l = 1 (Roberts, Yaida & Hanin 2022,
    chapter 5): GELU, SiLU, Mish. Raises ConfigError.
    """
    known = activation_called(activation)
    table = expectations(known)
    if _homogeneous(table):
        weight_variance = 1 / table.at(1.0).dphi2
        return Critical(known.name, weight_variance, 0.0, math.nan, "χ is 1 at every q")
    if _ends_at_origin(table) and _excess_of_stability(table, _stands_out) < 0:
        weight_variance = 1 / table.at(0.0).dphi2
        return Critical(known.name, weight_variance, 0.0, 0.0, "χ is 1 at q = 0, where q goes")
    q = _half_stable(table)
    if q is None:
        return Critical(known.name, None, math.nan, math.nan, _why_none(table))
    there = table.at(q)
    bias_variance = q - there.phi2 / there.dphi2
    reason = "half-stable: χ and the stability of q are both 1"
    return Critical(known.name, 1 / there.dphi2, bias_variance, q, reason)


def critical_line(
    activation: str | ActivationFunction | Activation, bias_variances: ArrayLike
) -> CriticalLine:
    """The weight variance at which χ = 1, for each bias variance.

    Of several the one with a stable q, of these that with the least q. Raises ConfigError.
    """
    known = activation_called(activation)
    biases = np.asarray(bias_variances, np.float64)
    if not ((biases >= 0) & np.isfinite(biases)).all():
        message = f"bias_variances: {biases.tolist()!r} has a value below 0 or none at all"
        raise ConfigError(message)
    table = expectations(known)
    found = np.array([_on_line(table, float(bias)) for bias in biases.ravel()]).reshape(-1, 3)
    weights, q, stability = (column.reshape(biases.shape) for column in found.T)
    return CriticalLine(known.name, biases, weights, q, stability)


def _on_line(table: Expectations, bias: float) -> tuple[float, float, float]:
    """Weight variance, q and stability where χ = 1."""
    if _homogeneous(table):
        if bias > 0:
            return math.nan, math.nan, math.nan
        return 1 / table.at(1.0).dphi2, math.nan, 1.0
    if bias == 0 and _ends_at_origin(table):
        return 1 / table.at(0.0).dphi2, 0.0, 1.0

    def missing(q: float) -> float:
        return _bias_variance(table, q) - bias

    q, squares, slopes, _ = _near(table)
    roots = _roots(missing, q, q - squares / slopes - bias)
    points = [(root, table.at(root)) for root in roots]
    ranked = sorted((m.slope / m.dphi2 > 1 + _EXACT, root) for root, m in points)
    if not ranked:
        return math.nan, math.nan, math.nan
    best = ranked[0][1]
    there = table.at(best)
    return 1 / there.dphi2, best, there.slope / there.dphi2


def _bias_variance(table: Expectations, q: float) -> float:
    """σ_b² that keeps q where the weight variance makes χ = 1."""
    there = table.at(q)
    return q - there.phi2 / there.dphi2


def _half_stable(table: Expectations) -> float | None:
    q, _, slopes, stability = _near(table)
    roots = _roots(lambda q: table.at(q).phi_ddphi, q, stability / slopes - 1)
    allowed = (root for root in roots if _bias_variance(table, root) >= 0)
    return next(allowed, None)


def _roots(function: Callable[[float], float], q: F64, values: F64) -> list[float]:
    found = np.flatnonzero((values[:-1] * values[1:] < 0) & (np.abs(values[:-1]) > _EXACT * 1e-4))
    return [float(brentq(function, q[i], q[i + 1], xtol=1e-300, rtol=1e-14)) for i in found]


def _near(table: Expectations) -> tuple[F64, F64, F64, F64]:
    """The table's curves where q is of a size that occurs and the gradient is not zero."""
    q, squares, slopes, stability = table.curves
    usable = (q <= _WIDEST) & (slopes > 0) & np.isfinite(squares) & np.isfinite(stability)
    return q[usable], squares[usable], slopes[usable], stability[usable]


def _homogeneous(table: Expectations) -> bool:
    q, squares, slopes, stability = _near(table)
    same = np.abs(squares / (q * slopes) - 1) < _EXACT
    return bool(q.size and (same & (np.abs(stability / slopes - 1) < _EXACT)).all())


def _ends_at_origin(table: Expectations) -> bool:
    """Whether χ = 1 at q = 0 for some weight variance: φ(0) = 0, with a slope."""
    return table.at_zero == 0 and table.at(0.0).dphi2 > _EXACT


def _excess_of_stability(table: Expectations, choose: Callable[[F64], float]) -> float:
    _, _, slopes, stability = _near(table)
    return choose(stability / slopes - 1)


def _stands_out(excess: F64) -> float:
    """The first that is more than rounding: hard-tanh is a line up to there."""
    distinct = excess[np.abs(excess) > _EXACT]
    return float(distinct[0]) if distinct.size else 0.0


def _why_none(table: Expectations) -> str:
    q, squares, slopes, stability = _near(table)
    if not q.size:
        return "its derivative is zero nearly everywhere"
    allowed = q - squares / slopes >= 0
    if not allowed.any():
        return "χ would be 1 with a negative bias variance only"
    stable = allowed & (stability / slopes <= 1)
    if not stable.any():
        return "wherever χ is 1, q is unstable and runs away"
    without_bias, at, _ = _on_line(table, 0.0)
    least = np.nanmin([without_bias, 1 / slopes[stable].max()])
    where = f", at q = {at:.3g}" if least == without_bias else ""
    return f"χ is 1 only with a weight variance of {least:.3g} and more{where}"
