"""The gradient along the depth of the network: at the outputs of the layers that have weights.

At outputs, because parameter gradients hide the decay: in a net of ReLU layers ⟨w, ∂L/∂w⟩ is
the same in every layer whatever the initialization (Euler's theorem for homogeneous functions).
Norms, because their factor per layer does not depend on widths.
"""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence
from gradscope.analysis.once import once
from gradscope.analysis.robust import F64, Bools, measured, median
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.words import count
from gradscope.record import Entity, Run, StepArray

_LAYERS = frozenset({"linear", "convolution"})
# Steepness over fewer layers is not a matter of depth.
_FEWEST_LAYERS = 4
# Each half of the way must carry this share of the change, and no single layer more than this:
# a zero-initialized head, a branch beside the chain, is not decay along depth.
_MIN_HALF = 0.2
_MAX_LAYER = 0.5
# Neighbours of a layer that alone loses the gradient lose less than this share of what it does.
_QUIET = 0.5
# Before a layer are two others at least, as one may be a branch; where a net begins with attention,
# queries, keys and values.
_BRANCHES, _OF_ATTENTION = 2, 3


@dataclass(frozen=True, eq=False, slots=True)
class DepthProfile:
    """Norms of the output gradients: `norms` has shape (steps, layers), in order of execution.

    NaN: the layer did not run, or got no gradient. Only steps with finite gradients are in it.
    """

    layers: tuple[Entity, ...]
    steps: StepArray
    norms: F64
    # How many of the first layers may be branches.
    branches: int = _BRANCHES

    @property
    def _third(self) -> int:
        return max(1, len(self.layers) // 3)

    @property
    def _last(self) -> slice:
        """The last third, without the output layer where there are enough.

        Its gradient is the loss's own, at whatever scale.
        """
        end = len(self.layers) - (len(self.layers) > _FEWEST_LAYERS)
        return slice(end - self._third, end)

    @property
    def spanned(self) -> Bools:
        """Per step: whether gradients came to both of its ends.

        Of networks that train in turn a step may concern the later layers only.
        """
        first = measured(self.norms[:, : self._third])
        last = measured(self.norms[:, self._last])
        return np.asarray(first.any(axis=1) & last.any(axis=1))

    @property
    def growth(self) -> F64:
        """Per step: log10 of the gradient at the first layer over the last, by their trend.

        Negative: it fades on its way back; 0 where the change is not spread over the depth.
        Tukey's resistant line, through medians of thirds, because single layers lie beside the
        chain: queries and keys of attention, gates, shortcuts.
        """
        logs = np.log10(self.norms)
        first = median(logs[:, : self._third], axis=1)
        last = median(logs[:, self._last], axis=1)
        between = logs[:, self._third : self._last.start]
        middle = median(between, axis=1) if between.shape[1] else (first + last) / 2
        change = first - last
        direction = np.sign(change)
        smaller_half = np.minimum((first - middle) * direction, (middle - last) * direction)
        jumps = np.nan_to_num(-np.diff(logs, axis=1)) * direction[:, None]
        size = np.abs(change)
        spread = (smaller_half >= _MIN_HALF * size) & (jumps.max(axis=1) <= _MAX_LAYER * size)
        growth: F64 = np.where(spread, change, 0.0)
        growth *= (len(self.layers) - 1) / self._last.start
        return growth

    def decades_lost(self) -> F64:
        """Per step and layer: the decades of the gradient's norm that it alone loses; else 0.

        From its output to that of the layer before it: all before hear that much less, while
        its neighbours along the chain lose little. The first few are 0, as what is before them may
        be a branch; so is the last: its gradient is the loss's own, at whatever scale.
        """
        logs = np.log10(self.norms)
        # What is before a layer hears at most as much as the best of it: queries and keys of
        # attention, the inside of a zero-initialized branch, hear less than the chain does.
        filled = np.where(measured(logs), logs, -np.inf)
        before = np.maximum.accumulate(filled, axis=1)
        own = slice(self.branches, -1)
        lost = logs[:, own] - before[:, self.branches - 1 : -2]
        behind = logs[:, self.branches + 1 :] - logs[:, own]
        ahead = np.diff(before, axis=1)[:, self.branches - 2 : -2]
        alone = (np.abs(behind) <= _QUIET * lost) & (np.abs(ahead) <= _QUIET * lost)
        decades = np.zeros_like(logs)
        decades[:, own] = np.where(alone & np.isfinite(lost), lost, 0.0)
        return decades

    def factor(self, growth: float) -> float:
        """What the growth is per layer."""
        return float(10 ** (growth / (len(self.layers) - 1)))

    def relative(self) -> F64:
        """Per layer: its gradient over the last third's, in the median over the steps."""
        last = median(self.norms[:, self._last], axis=1)
        return median(self.norms / last[:, None], axis=0)


def change_along_depth(change: float, steps: StepArray, limit: float) -> Evidence:
    """The first layer's gradient over the last's, as evidence."""
    quantity = "output_grad_norm, first layer / last layer (trend)"
    return Evidence(quantity, None, int(steps[0]), int(steps[-1]), change, limit)


@once
def depth_profile(run: Run) -> DepthProfile:
    """The profile. Raises UnjudgedError where there are too few layers or no clean step."""
    table = run.modules
    rows = [index for index, entity in enumerate(table.entities) if _is_layer(run, entity)]
    rows.sort(key=lambda index: table.entities[index].depth)
    norms = table["output_grad_norm"][:, rows].astype(np.float64)
    broken = table["output_grad_nonfinite"][:, rows] > 0
    # A branch that never gets a gradient is missing, not small.
    seen: Bools = np.asarray(measured(norms).any(axis=0))
    norms, broken = norms[:, seen], broken[:, seen]
    layers = tuple(table.entities[row] for row, kept in zip(rows, seen, strict=True) if kept)
    if len(layers) < _FEWEST_LAYERS:
        found = count(len(layers), "layer")
        message = f"{found} with weights got a gradient, {_FEWEST_LAYERS} are needed"
        raise UnjudgedError(message)
    # All zero has no slope; what is infinite was not measured by the rule's meaning.
    clean = (norms > 0).any(axis=1) & ~broken.any(axis=1) & ~np.isinf(norms).any(axis=1)
    if not clean.any():
        message = "no recorded step had a finite gradient at every layer"
        raise UnjudgedError(message)
    profile = DepthProfile(layers, table.steps[clean], _without_zeros(norms[clean]))
    whole = profile.spanned
    if not whole.any():
        message = "no recorded step had a gradient at both the first and the last layers"
        raise UnjudgedError(message)
    branches = _OF_ATTENTION if _has_attention(run) else _BRANCHES
    return DepthProfile(layers, profile.steps[whole], profile.norms[whole], branches)


def _has_attention(run: Run) -> bool:
    kinds = (f"{entity.name} {entity.type}".lower() for entity in run.modules.entities)
    return any("attention" in kind or "softmax" in kind for kind in kinds)


def _without_zeros(norms: F64) -> F64:
    """Zeros as the smallest other norm of their step.

    What float32 can't hold any more has faded at least as far as the last that it holds; and a
    layer that is cut off from its neighbours (GS003) makes no slope.
    """
    smallest = np.where(norms > 0, norms, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    filled: F64 = np.where(norms == 0, smallest, norms)
    return filled


def _is_layer(run: Run, entity: Entity) -> bool:
    """Whether it has a matrix of weights that its input goes through."""
    # A further use of a layer is not a layer further down.
    if "#" in entity.name:
        return False
    if entity.group in _LAYERS:
        return True
    # Layers of model libraries, as GPT-2's Conv1D.
    weight = f"{entity.name}.weight"
    if entity.group != "other" or weight not in run.parameters.names:
        return False
    return len(run.parameters.entities[run.parameters.names.index(weight)].shape) > 1
