"""What mean-field theory says of the user's own model, where it is a plain chain of layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from gradscope.capture.entities import module_group
from gradscope.comparison.activation import Activation
from gradscope.comparison.meanfield import predict
from gradscope.comparison.measure import fit
from gradscope.comparison.result import Cell, Name
from gradscope.errors import ConfigError

_FEWEST = 4
_WIDE = 64


@dataclass(frozen=True, eq=False, slots=True)
class Chain:
    """Whether theory's nets have the model's form; reason: why they don't."""

    reason: str
    widths: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, *, plain: bool) -> "Chain":
        """plain: whether each layer's output alone feeds the next."""
        groups = {type(m).__name__ for m in model.modules() if module_group(m) == "norm"}
        if not plain:
            reason = "no theory: the layers are no plain chain"
        elif groups:
            reason = f"no theory for a mean of {', '.join(sorted(groups))} and plain layers"
        else:
            reason = ""
        widths = tuple(p.shape[0] for p in model.parameters() if p.dim() > 1)
        return cls(reason, widths[:-1])


def predicted(
    chain: Chain,
    own: Activation | None,
    activations: Mapping[str, Activation],
) -> Callable[[Name, Sequence[Cell]], tuple[float, str]]:
    """Per layer ln χ of a configuration, and a remark; see `ranking.Theory`.

    It starts from the first pre-activation's variance that was measured, and goes layer by layer:
    the fixed point may be far. own: what the model has everywhere, if it is one activation.
    """

    def theory(name: Name, cells: Sequence[Cell]) -> tuple[float, str]:
        if chain.reason:
            return math.nan, chain.reason
        if name.mitigation not in {"none", "weight_decay", "clip_norm", "clip_value", "dropout"}:
            return math.nan, f"no theory with {name.mitigation}"
        activation = activations.get(name.activation, own)
        depth = max((len(cell.gradient) for cell in cells), default=0)
        if activation is None or depth < _FEWEST:
            return math.nan, "no theory: unknown activation, or too few layers"
        first = float(np.mean([cell.variance[0] for cell in cells]))
        weights = float(np.mean([cell.weight_variance for cell in cells]))
        biases = float(np.mean([cell.bias_variance for cell in cells]))
        try:
            field = predict(activation, weights, biases, q0=first, depth=depth - 1)
        except ConfigError as error:
            return math.nan, f"no theory: {error}"
        with np.errstate(divide="ignore"):
            curve = np.concatenate([np.zeros(1), -np.cumsum(np.log(field.chi))])
        remark = ""
        if not field.steady:
            remark = "the variance leaves an unstable point at random, theory alone misleads"
        elif min(chain.widths, default=_WIDE) < _WIDE:
            remark = f"layers of {min(chain.widths)} units are far from infinitely many"
        return -fit(curve).slope, remark

    return theory
