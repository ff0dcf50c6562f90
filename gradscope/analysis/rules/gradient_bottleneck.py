"""GS103 gradient-bottleneck."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.depth import depth_profile
from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import progress, severity, standing_still
from gradscope.analysis.layers import module_of
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a layer counts as a bottleneck."""

    # A factor of 100 at one layer (design). Ordinary layers change the norm by 0.14 (sigmoid,
    # default initialization) to 2; a mean over 56×56 positions divides it by 56.
    loss: float = 1e2
    # Without a loss that is stuck only what no update survives counts, as in GS101.
    extreme_loss: float = 1e6
    # Zero-initialized branches and gates open within a few steps; half of them are not few.
    min_share_of_steps: float = 0.5


# Its weights are this much smaller than the others' before they are what is blamed.
_SMALL = 0.1


@rule("GS103", name="gradient-bottleneck", requires=("modules.output_grad_norm",), limits=Limits())
def gradient_bottleneck(run: Run, limits: Limits) -> Iterator[Finding]:
    """One layer lets next to nothing of the gradient through.

    ## What it measures
    The norm of the gradient arriving at the output of each layer with weights, over the largest
    that arrives at any layer before it. A factor of 100 or more counts, in half of the recorded
    steps, if the layers on both sides of it pass on what they get.

    ## Why it matters
    All that comes before learns a hundred times slower than what comes after, or not at all. The
    cause is in one place: weights of the wrong scale, a factor in the forward, an activation
    that is saturated, a softmax between layers.

    ## How sure it is
    Certain that the gradient drops there. That it is one layer's fault is likely: a branch that
    no table shows may carry the rest.

    ## Known limits
    Does not judge the first two layers (where there is attention, three), which may be branches,
    nor the last, where the loss's own scale is. A branch beside the chain is not a bottleneck, nor
    is a gate that opens within the first steps. A gradient of exactly zero is GS003. Under Adam the
    layers before it move all the same: then, and while the loss falls, it is information.

    ## Example
    `x = self.fc3(self.fc2(x) * 1e-4)` in a stack of linear layers: all before `fc3` get 1e-4 of
    its gradient. Do instead: leave out the factor, or divide the learning rate rather than the
    signal.

    ## References
    Glorot & Bengio 2010 (AISTATS), section 4; Balduzzi et al. 2017 (ICML), on the gradient layer
    by layer; He et al. 2016 (CVPR), whose shortcuts lead around such a layer.
    """
    profile = depth_profile(run)
    lost = profile.decades_lost()
    found = lost >= math.log10(limits.loss)
    lasting = found.mean(axis=0) >= limits.min_share_of_steps
    if not lasting.any():
        return
    typical = np.array(
        [np.median(lost[rows, i]) if rows.any() else 0 for i, rows in enumerate(found.T)]
    )
    column = int(np.argmax(np.where(lasting, typical, -np.inf)))
    factor = 10 ** float(typical[column])
    layer, before = profile.layers[column], profile.layers[:column]
    steps = profile.steps[found[:, column]]
    loss = progress(run)
    quiet = _still(run, before)
    moved = f"{len(quiet)} of their weights in effect stand still" if quiet else "they still move"
    yield gradient_bottleneck.finding(
        severity(loss, still=bool(quiet), extreme=factor >= limits.extreme_loss),
        layer.name,
        f"The gradient loses a factor {number(factor)} at {layer_in_words(layer.name)} alone, on "
        f"its way to the {len(before)} before it; {moved}, and {loss.words}.",
        evidence=(
            Evidence(
                "output_grad_norm, the layer's / the largest before it",
                layer.name,
                int(steps[0]),
                int(steps[-1]),
                factor,
                limits.loss,
            ),
        ),
        remedies=_remedies(run, profile.layers, column),
    )


def _still(run: Run, before: tuple[Entity, ...]) -> list[str]:
    """The weights of the layers before it that stand still."""
    names = {entity.name for entity in before}
    still = np.flatnonzero(standing_still(run))
    return [name for i in still if module_of(name := run.parameters.names[i]) in names]


def _remedies(run: Run, layers: tuple[Entity, ...], column: int) -> tuple[str, ...]:
    name = layer_in_words(layers[column].name)
    scales = [_scale(run, layer) for layer in layers]
    known = [scale for scale in scales if math.isfinite(scale) and scale > 0]
    own, others = scales[column], float(np.median(known)) if known else math.nan
    weights = (
        f"Initialize the weight of {name} as the others: its σ_w = rms(w)·√fan_in is "
        f"{number(own)}, theirs {number(others)}; "
        "nn.init.kaiming_normal_(weight, nonlinearity='relu').",
    )
    between = (
        f"Look at what is between {layer_in_words(layers[column - 1].name)} and {name}: a small "
        "factor, a softmax, a saturated activation; a norm (nn.LayerNorm) before it fixes the "
        "scale.",
        f"A residual connection around {name} leads the gradient past it.",
    )
    return (*(weights if own <= _SMALL * others else ()), *between)


def _scale(run: Run, layer: Entity) -> float:
    """rms(w)·√fan_in of its weight at the first recorded step; NaN where it is not known."""
    table = run.parameters
    name = f"{layer.name}.weight"
    if name not in table.names:
        return math.nan
    index = table.names.index(name)
    fan_in = math.prod(table.entities[index].shape[1:])
    return float(table["weight_rms"][0, index]) * math.sqrt(fan_in)
