"""The gradient along the depth of the network: at the outputs of the layers that have weights.

At outputs, because parameter gradients hide the decay: in a net of ReLU layers ⟨w, ∂L/∂w⟩ is
the same in every layer whatever the initialization (Euler's theorem for homogeneous functions).
Norms, because their factor per layer does not depend on widths.
"""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.robust import F64, Bools, measured
from gradscope.record import Entity, Run, StepArray

_LAYERS = frozenset({"linear", "convolution"})
# Steepness over fewer layers is not a matter of depth.
_FEWEST_LAYERS = 4


@dataclass(frozen=True, eq=False, slots=True)
class DepthProfile:
    """Norms of the output gradients: `norms` has shape (steps, layers), in order of execution.

    Only steps at which every layer's gradient was finite and not zero are in it.
    """

    layers: tuple[Entity, ...]
    steps: StepArray
    norms: F64

    @property
    def _third(self) -> int:
        return len(self.layers) // 3

    @property
    def growth(self) -> F64:
        """Per step: log10 of the gradient at the first third of the layers over the last third.

        Negative: it fades on its way back. Medians of thirds (Tukey's resistant line), because
        single layers lie beside the chain: queries and keys of attention, gates, shortcuts.
        """
        logs = np.log10(self.norms)
        first, last = logs[:, : self._third], logs[:, -self._third :]
        change: F64 = np.median(first, axis=1) - np.median(last, axis=1)
        return change

    def factor(self, growth: float) -> float:
        """What the growth is per layer."""
        return float(10 ** (growth / (len(self.layers) - self._third)))

    def relative(self) -> F64:
        """Per layer: its gradient over the last third's, in the median over the steps."""
        last = np.median(self.norms[:, -self._third :], axis=1, keepdims=True)
        relative: F64 = np.median(self.norms / last, axis=0)
        return relative


def depth_profile(run: Run) -> DepthProfile | None:
    """The profile, or None where there are too few layers or no clean step."""
    table = run.modules
    rows = [
        index
        for index, entity in enumerate(table.entities)
        # A further use of a layer is not a layer further down.
        if entity.group in _LAYERS and "#" not in entity.name
    ]
    rows.sort(key=lambda index: table.entities[index].depth)
    norms = table["output_grad_norm"][:, rows].astype(np.float64)
    broken = table["output_grad_nonfinite"][:, rows] > 0
    # A branch that gets no gradient is missing, not small.
    seen: Bools = np.asarray(measured(norms).any(axis=0))
    norms, broken = norms[:, seen], broken[:, seen]
    layers = tuple(table.entities[row] for row, kept in zip(rows, seen, strict=True) if kept)
    if len(layers) < _FEWEST_LAYERS:
        return None
    clean = np.isfinite(norms).all(axis=1) & (norms > 0).all(axis=1) & ~broken.any(axis=1)
    if not clean.any():
        return None
    return DepthProfile(layers, table.steps[clean], norms[clean])
