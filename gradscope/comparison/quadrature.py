"""Averages of an activation and its derivative over a Gaussian, to about twelve digits."""

import copy
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gradscope.comparison.activation import Activation, ActivationFunction
from gradscope.errors import ConfigError

F64 = NDArray[np.float64]

# Gauss-Hermite fails for kinked derivatives: hard-tanh is wrong in the second digit with 200 nodes.
# So panels of Gauss-Legendre end at the kinks. They are the same for every variance, hence the
# function is evaluated once. Powers of two resolve a Gaussian of any width; a quarter resolves
# what the function itself does.
_NODES = 16
_OCTAVES = 500
_PANELS = (
    2.0 ** np.arange(-_OCTAVES, _OCTAVES + 1),
    np.arange(0.25, 16, 0.25),
    np.arange(16.0, 64),
)
# Beyond, the density is 1e-34 of its peak; below, lies 1e-16 of the mass.
_REACH = 12.5
_CORE = 2.0**-52
# In deviations, and relative: so little of E φ² lies there, or the average is not to be had.
_FAR = 10.0
_NEGLIGIBLE = 1e-9
# Outside, the squares of nodes leave the range of a double. The limit is taken there instead.
_LEAST, _GREATEST = 2.0**-880, 2.0**980
# Where an activation must be a number, and where its kinks are looked for.
_SEEN = 64.0
_SEARCHED = 16.0
_SPACING = 1 / 128
_HALVINGS = 36
# Relative to the derivative's size. Over the last interval, 1e-13, a smooth one changes by less.
_JUMP = 1e-7
# More are steps of rounding, as of a function that works in single precision.
_MOST_KINKS = 64
# E φφ'x / q cancels to rounding / √q where φ(0) is not 0; here that and its limit's error balance.
_CANCELLED = 1e-10


@dataclass(frozen=True, slots=True)
class Moments:
    """Averages over x ~ N(0, q): of φ, φ², φ′, φ′², φ′⁴ and φφ″. At q = 0 the limit from above.

    φφ″ counts kinks: it is what makes φ′² + φφ″ the derivative of E φ² in q.
    """

    q: float
    phi: float
    phi2: float
    dphi: float
    dphi2: float
    dphi4: float
    phi_ddphi: float

    @property
    def slope(self) -> float:
        """The derivative of E φ² in q: times the weight variance, the stability of q."""
        return self.dphi2 + self.phi_ddphi

    @property
    def variance(self) -> float:
        """Of φ."""
        return max(self.phi2 - self.phi**2, 0.0)

    @property
    def kurtosis(self) -> float:
        """E φ′⁴ / (E φ′²)²: 1 for a line, 2 for ReLU, NaN where there is no slope at all."""
        return self.dphi4 / self.dphi2 / self.dphi2 if self.dphi2 else float("nan")


@dataclass(frozen=True, eq=False)
class Expectations:
    """Averages of one activation over N(0, q), for any q.

    nodes: positive, ascending. integrands: of shape (6, nodes), the sum of both signs times the
    quadrature's weight over the node.
    """

    activation: Activation
    kinks: tuple[float, ...]
    nodes: F64
    integrands: F64
    at_zero: float

    def at(self, q: float) -> Moments:
        """The averages at one variance."""
        if math.isnan(q):
            return Moments(q, q, q, q, q, q, q)
        seen = min(max(q, _LEAST), _GREATEST)
        phi, phi2, dphi, dphi2, dphi4, product = self._averages(seen)
        phi_ddphi = product / seen - dphi2
        if self.at_zero and seen < _CANCELLED:
            *_, dphi2_there, _, product = self._averages(_CANCELLED)
            phi_ddphi = product / _CANCELLED - dphi2_there
        if q < _LEAST:
            phi, phi2 = self.at_zero, self.at_zero**2
        elif not q <= _GREATEST:
            phi2 = float("inf")
        return Moments(q, phi, phi2, dphi, dphi2, dphi4, phi_ddphi)

    def _averages(self, q: float) -> list[float]:
        deviation = q**0.5
        first = np.searchsorted(self.nodes, deviation * _CORE)
        last = np.searchsorted(self.nodes, deviation * _REACH)
        scaled = self.nodes[first:last] / deviation
        density = scaled * np.exp(-0.5 * scaled**2) * (2 * np.pi) ** -0.5
        # A function may overflow where q reaches: its averages then are infinite, or NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            averages: list[float] = (self.integrands[:, first:last] @ density).tolist()
            far = scaled >= _FAR
            end = self.integrands[1, first:last][far] @ density[far]
        # What grows as an exponential has its mean square where no sample ever lies.
        if end > _NEGLIGIBLE * averages[1]:
            return [math.inf] * len(averages)
        return averages

    @cached_property
    def grid(self) -> tuple[Moments, ...]:
        """The averages at variances from 1e-12 to 1e12, six hundred of them, evenly in the log."""
        return tuple(self.at(float(q)) for q in np.geomspace(1e-12, 1e12, 601))

    @cached_property
    def curves(self) -> tuple[F64, F64, F64, F64]:
        """q, E φ², E φ′² and the slope of E φ² over the grid."""
        return (
            np.array([m.q for m in self.grid]),
            np.array([m.phi2 for m in self.grid]),
            np.array([m.dphi2 for m in self.grid]),
            np.array([m.slope for m in self.grid]),
        )


def expectations(activation: Activation) -> Expectations:
    """The averages of that activation.

    Raises ConfigError where it returns NaN or has no derivative.
    """
    # A module's parameters may change between two calls.
    lasting = isinstance(activation.function, Hashable)
    if lasting and not isinstance(activation.function, nn.Module):
        return _tabulated(activation)
    return _tabulate(activation)


def moments(activation: Activation, q: float) -> Moments:
    """The averages of an activation over N(0, q)."""
    return expectations(activation).at(q)


def values_and_slopes(activation: Activation, at: F64) -> tuple[F64, F64]:
    """φ and φ′ in float64, φ′ by autograd.

    Raises ConfigError where one of them is NaN within ±64, or there is no derivative.
    """
    phi, dphi = _differentiated(_in_doubles(activation), activation.name, at, 1)
    for what, found in (("", phi), ("'s derivative", dphi)):
        wrong = np.isnan(found) & (np.abs(at) <= _SEEN)
        if wrong.any():
            where = float(at[wrong][0])
            message = (
                f"activation: {activation.name}{what} is NaN at {where:.6g}; it must be a number"
            )
            raise ConfigError(message)
    return phi, dphi


def panels(edges: F64) -> tuple[F64, F64]:
    """Nodes and weights of Gauss-Legendre on every interval between sorted edges, flat."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = np.diff(edges)[:, None] / 2
    at = edges[:-1, None] + half * (nodes + 1)
    return at.ravel(), (half * weights).ravel()


def edges(kinks: tuple[float, ...]) -> F64:
    """Where panels end on the positive side; a kink ends one on both."""
    away = [abs(kink) for kink in kinks if 2.0**-_OCTAVES < abs(kink) < 2.0**_OCTAVES]
    return np.unique(np.concatenate([*_PANELS, away]))


@lru_cache(maxsize=128)
def _tabulated(activation: Activation) -> Expectations:
    return _tabulate(activation)


def _tabulate(activation: Activation) -> Expectations:
    kinks = find_kinks(activation) if activation.kinks is None else activation.kinks
    nodes, weights = panels(edges(kinks))
    # What overflows lies where no average reaches, or makes it infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        right = _integrands(activation, nodes)
        left = _integrands(activation, -nodes)
        integrands = (right + left) * (weights / nodes)
    at_zero = values_and_slopes(activation, np.zeros(1))[0]
    return Expectations(activation, kinks, nodes, integrands, float(at_zero[0]))


def _integrands(activation: Activation, at: F64) -> F64:
    phi, dphi = values_and_slopes(activation, at)
    return np.stack([phi, phi**2, dphi, dphi**2, dphi**4, phi * dphi * at])


def find_kinks(activation: Activation) -> tuple[float, ...]:
    """Where φ′ or φ″ jumps within ±16.

    Every interval of 1/128 is halved 36 times towards the larger change. Over what is left of it
    a smooth function changes by nothing. Two kinks in one interval are taken for one; more than
    64 in all for rounding.
    """
    function = _in_doubles(activation)
    found: list[float] = []
    for order in (1, 2):
        low = np.arange(-_SEARCHED, _SEARCHED, _SPACING)
        high = low + _SPACING
        below = _differentiated(function, activation.name, low, order)[1]
        above = _differentiated(function, activation.name, high, order)[1]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            there = _differentiated(function, activation.name, middle, order)[1]
            upper = np.abs(above - there) > np.abs(there - below)
            low, below = np.where(upper, middle, low), np.where(upper, there, below)
            high, above = np.where(upper, high, middle), np.where(upper, above, there)
        jumps = np.abs(above - below) > _JUMP * (1 + np.abs(below))
        # An interval's end on a kink finds it a second time.
        found += [round(float(x), 10) for x in (low + high)[jumps] / 2]
    kinks = tuple(sorted(set(found)))
    return kinks if len(kinks) <= _MOST_KINKS else ()


def _in_doubles(activation: Activation) -> ActivationFunction:
    function = activation.function
    if not isinstance(function, nn.Module):
        return function
    module: nn.Module = copy.deepcopy(function).double().cpu().eval()
    return module


def _differentiated(
    function: ActivationFunction, name: str, at: F64, order: int
) -> tuple[F64, F64]:
    """The function, and its first or second derivative; a second that autograd lacks is zero."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        points = torch.from_numpy(np.ascontiguousarray(at)).requires_grad_()
        # A clone may be changed in place, a leaf may not.
        values = function(points.clone())
        if not values.requires_grad:
            message = (
                f"activation: autograd finds no derivative of {name}; write it in torch operations"
            )
            raise ConfigError(message)
        derivative = values
        for further in reversed(range(order)):
            if not derivative.requires_grad:
                return values.detach().double().numpy(), np.zeros_like(at)
            (derivative,) = torch.autograd.grad(
                derivative.sum(), points, create_graph=further > 0, materialize_grads=True
            )
    # A derivative that is zero by construction has no memory: `force` gives it some.
    return values.detach().double().numpy(), derivative.detach().double().numpy(force=True)
