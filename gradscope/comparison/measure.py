"""One seed of one configuration: a forward and a backward, and what is read off them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from gradscope.comparison.activation import ACTIVATIONS, Activation
from gradscope.comparison.isometry import conditioning
from gradscope.comparison.mitigation import Mitigation
from gradscope.comparison.result import F64, Cell, Name
from gradscope.comparison.roles import Bias, Layout, Weight, roles_of
from gradscope.comparison.sites import Site, Sites
from gradscope.comparison.swapping import swapping
from gradscope.comparison.trunk import Gradients, Output, Outputs, Point, points, seeing_outputs

Loss = Callable[[nn.Module], Tensor]

# A slope needs so many layers.
_FEWEST = 3
# Of its steepest, what counts as flat (Glorot & Bengio 2010 call such units saturated).
_FLAT = 0.01
_EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Setting:
    """What a model is run with: where activations are, which ones, and the batch's size."""

    sites: Sites
    activation: Activation | None
    mitigation: Mitigation | None
    samples: int | None


@dataclass(slots=True)
class _Derivatives:
    """φ′ at the hidden activations of one forward."""

    activation: Activation | None
    squares: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)

    def probe(self, site: Site, before: Tensor, output: Tensor) -> None:
        if not (before.requires_grad and output.requires_grad):
            return
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(
                output.sum(), before, retain_graph=True, allow_unused=True
            )
        if slope is None:
            return
        slope = slope.detach().movedim(site.unit_dimension, 0).flatten(1)
        self.squares.append(float(slope.double().square().mean()))
        self.dead.append(float((slope == 0).all(dim=1).double().mean()))
        flat = slope.abs() < _FLAT * _steepest(self.activation, site)
        self.saturated.append(float(flat.double().mean()))


_STEEPEST: dict[str, float] = {}


def _steepest(activation: Activation | None, site: Site) -> float:
    known = activation or ACTIVATIONS.get(site.activation or "")
    if known is None:
        return 1.0
    if known.name not in _STEEPEST:
        grid = torch.linspace(-8, 8, 1601, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(known(grid).sum(), grid)
        _STEEPEST[known.name] = float(slope.abs().max())
    return _STEEPEST[known.name]


def measured(name: Name, seed: int, model: nn.Module, loss_of: Loss, setting: Setting) -> Cell:
    """What one forward and backward of the model show; its gradients are left in it."""
    derivatives = _Derivatives(setting.activation)
    through_time = _ThroughTime()
    with ExitStack() as afterwards:
        afterwards.enter_context(
            swapping(
                model,
                setting.sites,
                setting.activation,
                mitigation=setting.mitigation,
                probe=derivatives.probe,
            )
        )
        afterwards.enter_context(through_time.watching(model))
        outputs = afterwards.enter_context(seeing_outputs(model))
        loss = loss_of(model)
        read_at = points(loss, outputs.seen)
        evenness = conditioning(model, read_at, outputs.seen, setting.samples)
        gradients = Gradients(read_at, setting.samples)
        afterwards.callback(gradients.close)
        loss.backward()
    logs = np.array(gradients.logs, np.float64)
    roles = roles_of(model)
    weights = [w for w in roles.weights if w.layout is not Layout.LOOKUP]
    variance = np.array([point.mean_square for point in read_at], np.float64)
    line = fit(2 * logs)
    norms = _norms(model)
    squares = [_squares(weight) for weight in weights]
    return Cell(
        name=name,
        seed=seed,
        loss=float(loss.detach()),
        gradient=logs,
        variance=variance,
        slope=-line.slope,
        time_slope=through_time.slope(),
        time_steps=through_time.steps,
        spread=line.spread,
        drift=fit(_log(variance)).slope,
        dead=_mean(derivatives.dead),
        saturated=_mean(derivatives.saturated),
        similarity=_similarity(outputs, setting.samples),
        update_ratio=_update_ratio(norms),
        conditioning=evenness,
        plug_in=_plug_in(weights, squares, read_at, outputs.seen, derivatives.squares),
        weight_variance=_weight_variance(weights, squares),
        bias_variance=_bias_variance(roles.biases),
        failure=_failure(norms, weights, float(loss.detach()), logs),
    )


def layer_names(model: nn.Module, loss_of: Loss) -> tuple[tuple[str, ...], bool]:
    """The names of the layers at which the gradient is read, and whether they are a plain chain."""
    with seeing_outputs(model) as outputs:
        read_at = points(loss_of(model), outputs.seen)
    chain = bool(read_at) and not any(point.joins for point in read_at)
    return tuple(point.name for point in read_at), chain and len(read_at) == len(outputs.seen)


@dataclass(frozen=True, slots=True)
class Line:
    """A robust line through values over layers; NaN where there are too few."""

    slope: float
    spread: float


def fit(values: F64) -> Line:
    """Theil and Sen's slope per layer, first and last layer aside where enough are left.

    The first sees inputs, the last the loss: both differ from those between them.
    """
    inner = values[1:-1] if len(values) >= _FEWEST + 2 else values
    places = np.flatnonzero(np.isfinite(inner))
    if len(places) < _FEWEST:
        return Line(float("nan"), float("nan"))
    kept = inner[places]
    slope, intercept, *_ = stats.theilslopes(kept, places)
    return Line(float(slope), float(np.std(kept - intercept - slope * places)))


def _log(values: F64) -> F64:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _similarity(outputs: Outputs, samples: int | None) -> float:
    """The mean cosine between two samples where they enter the last layer."""
    entering = outputs.last_input
    if entering is None or not samples or samples < 2 or len(entering) != samples:  # noqa: PLR2004
        return float("nan")
    rows = nn.functional.normalize(entering.double().flatten(1), dim=1)
    return float((rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def _update_ratio(norms: Mapping[str, tuple[float, float]]) -> float:
    ratios = [gradient / weight for gradient, weight in norms.values() if weight > 0]
    return float(np.median(ratios)) if ratios else float("nan")


def _norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """By weight, the norms of its gradient and of itself, of biases and norms the first alone."""
    named = dict(model.named_parameters())
    named = {name: p for name, p in named.items() if p.grad is not None}
    if not named:
        return {}
    arrived = [p.grad for p in named.values() if p.grad is not None]
    gradients = torch._foreach_norm(arrived)  # noqa: SLF001  (one call for all)
    weights = torch._foreach_norm([p.detach() for p in named.values()])  # noqa: SLF001
    return {
        name: (float(gradient), float(weight) if parameter.dim() > 1 else 0.0)
        for (name, parameter), gradient, weight in zip(
            named.items(), gradients, weights, strict=True
        )
    }


def _squares(weight: Weight) -> list[float]:
    """Of each of its blocks, the sum of squares."""
    values = _tensor(weight).detach()
    if len(weight.blocks) == 1:
        return [float(values.norm()) ** 2]
    return [float(weight.view(values, block).norm()) ** 2 for block in weight.blocks]


def _weight_variance(weights: Sequence[Weight], squares: Sequence[Sequence[float]]) -> float:
    """σ_w²: fan-in times the variance of the weights, over the layers between first and last."""
    found = [
        [b.fan_in * square / math.prod(b.shape) for b, square in zip(w.blocks, of, strict=True)]
        for w, of in zip(weights, squares, strict=True)
    ]
    return _mean([value for values in (found[1:-1] or found) for value in values])


def _bias_variance(biases: Sequence[Bias]) -> float:
    found = [_tensor(bias).detach().double() for bias in biases]
    return _mean([float(b.square().mean()) for b in found]) if found else 0.0


def _tensor(role: Weight | Bias) -> Tensor:
    tensor: Tensor = getattr(role.owner, role.attribute)
    return tensor


def _plug_in(
    weights: Sequence[Weight],
    squares: Sequence[Sequence[float]],
    read_at: Sequence[Point],
    outputs: Sequence[Output],
    derivatives: Sequence[float],
) -> float:
    """Per layer ln χ of a plain chain from its weights and the φ′² that were measured."""
    depth = len(read_at)
    chain = len(outputs) == depth == len(weights) == len(derivatives) + 1
    if not chain or any(point.joins for point in read_at):
        return float("nan")
    growth = [
        math.log(max(of[0], 1e-300))
        - math.log(w.blocks[0].matrix[0] * w.blocks[0].matrix[1])
        + math.log(max(derivative, 1e-300))
        for w, of, derivative in zip(weights[1:], squares[1:], derivatives, strict=True)
    ]
    # What it would be along the layers, by the same line.
    return -fit(np.concatenate([np.zeros(1), -np.cumsum(growth)])).slope


def _failure(
    norms: Mapping[str, tuple[float, float]], weights: Sequence[Weight], loss: float, gradient: F64
) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    broken = [name for name, (norm, _) in norms.items() if not math.isfinite(norm)]
    if broken:
        return f"the gradient of {broken[0]} is not finite"
    if len(gradient) and np.isneginf(gradient).any():
        return f"the gradient is exactly zero at {int(np.isneginf(gradient).sum())} layers"
    copies = [w.name for w in weights[:-1] if _are_copies(w)]
    if copies:
        return f"all units of {copies[0]} are copies of one another, and stay so"
    return None


def _are_copies(weight: Weight) -> bool:
    values = _tensor(weight).detach()
    gradient = _tensor(weight).grad
    if gradient is None or weight.layout is not Layout.ROWS or len(values) < 2:  # noqa: PLR2004
        return False
    # Two units tell nearly all apart.
    both = (values, gradient)
    return all(_are_equal(t[:2]) for t in both) and all(map(_are_equal, both))


def _are_equal(rows: Tensor) -> bool:
    return bool((rows - rows[0]).abs().max() <= _EQUAL * rows.abs().max())


class _ThroughTime:
    """The gradient that arrives at each time step of what enters a recurrent layer."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        self._first = False
        self.steps = 0

    def watching(self, model: nn.Module) -> ExitStack:
        handles = ExitStack()
        layer = next((m for m in model.modules() if isinstance(m, nn.RNNBase)), None)
        if layer is not None:
            self._first = layer.batch_first
            handles.callback(layer.register_forward_pre_hook(self._enter).remove)
        return handles

    def _enter(self, _layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entering = given[0] if given else None
        if not isinstance(entering, Tensor) or entering.dim() != 3:  # noqa: PLR2004
            return None
        if not entering.requires_grad:
            entering = entering.detach().requires_grad_()
        self.steps = entering.shape[1 if self._first else 0]
        entering.register_hook(self._keep)
        return (entering, *given[1:])

    def _keep(self, gradient: Tensor) -> None:
        self._gradient = gradient.detach()

    def slope(self) -> float:
        """Per time step towards the beginning, of ln of the squared norm; NaN without one."""
        if self._gradient is None:
            return float("nan")
        by_time = self._gradient.transpose(0, 1) if self._first else self._gradient
        norms = torch.linalg.vector_norm(by_time.double(), dim=2)
        return -fit(2 * norms.log().mean(dim=1).numpy()).slope
