"""What becomes of the angle between two inputs in a deep, wide net."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfc

from gradscope.comparison.activation import Activation
from gradscope.comparison.quadrature import F64, edges, expectations, panels, values_and_slopes

# A kinked activation's series is ever longer the nearer c* is to 1; its tail is then a power law.
_TERMS = 512
_REACH = 12.5


@dataclass(frozen=True, slots=True)
class Series:
    """E φ(u)φ(v) for a correlation c of u and v ~ N(0, q) is Σ aₖ² cᵏ (Mehler).

    squares: aₖ² of the normalized Hermite polynomials. values: what of E φ² lies beyond these
    terms; slopes: what of q E φ′² does, which is Σ k aₖ².
    """

    squares: F64
    values: float
    slopes: float

    def climb(self, c: float) -> float:
        """(E φ(u)² − E φ(u)φ(v)) / (1 − c): without the cancellation at c = 1."""
        powers = c ** np.arange(self.squares.size)
        terms = np.concatenate([[0.0], np.cumsum(powers)[:-1]])
        beyond = self.values - self.values * _tail(c, self.squares.size, 2.5)
        return float(self.squares @ terms) + beyond / (1 - c)

    def derivative(self, c: float) -> float:
        """E φ′(u)φ′(v), times q."""
        order = np.arange(1, self.squares.size)
        inside = float((order * self.squares[1:]) @ c ** (order - 1.0))
        return inside + self.slopes * _tail(c, self.squares.size, 1.5)


def series(activation: Activation, q: float) -> Series:
    """The Hermite series of an activation over N(0, q)."""
    table = expectations(activation)
    moments = table.at(q)
    deviation = math.sqrt(q)
    side = edges(table.kinks) / deviation
    side = side[(side > 2.0**-52) & (side < _REACH)]
    ends = np.unique(np.concatenate([-side, side, np.arange(-_REACH, _REACH + 0.1, 0.25)]))
    z, weights = panels(ends)
    phi, _ = values_and_slopes(activation, z * deviation)
    weighted = weights * phi * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    squares = np.empty(_TERMS)
    before, polynomial = np.zeros_like(z), np.ones_like(z)
    for order in range(_TERMS):
        squares[order] = (weighted @ polynomial) ** 2
        following = (z * polynomial - math.sqrt(order) * before) / math.sqrt(order + 1)
        before, polynomial = polynomial, following
    values = max(moments.phi2 - float(squares.sum()), 0.0)
    slopes = max(q * moments.dphi2 - float(np.arange(_TERMS) @ squares), 0.0)
    return Series(squares, values, slopes)


def chaotic(activation: Activation, weight_variance: float, q: float) -> tuple[float, float]:
    """c* < 1 and the correlation map's slope there, for a q* at which χ > 1.

    The map is a power series with coefficients that are not negative, hence convex: it has one
    such point, which attracts (Poole et al. 2016).
    """
    found = series(activation, q)
    scale = weight_variance / q

    def excess(c: float) -> float:
        return scale * found.climb(c) - 1

    # Rounding: an odd activation maps uncorrelated inputs to uncorrelated ones.
    if excess(0.0) >= -1e-12:  # noqa: PLR2004
        return 0.0, scale * found.derivative(0.0)
    nearly = 1 - 1e-9
    if excess(nearly) <= 0:
        return 1.0, scale * found.derivative(1.0)
    c = float(brentq(excess, 0.0, nearly, xtol=1e-14))
    return c, scale * found.derivative(c)


def _tail(c: float, first: int, power: float) -> float:
    """Σ k^-power cᵏ from `first` on, relative to its value at c = 1 (as an integral).

    A kink of φ gives aₖ² ~ k^-5/2. A smooth activation leaves nothing in the tail.
    """
    if c <= 0:
        return 0.0
    s = -first * math.log(c)
    rest = math.exp(-s) - math.sqrt(math.pi * s) * float(erfc(math.sqrt(s)))
    if power == 1.5:  # noqa: PLR2004
        return rest
    return math.exp(-s) - 2 * s * rest
