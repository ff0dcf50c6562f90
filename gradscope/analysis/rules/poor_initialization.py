"""GS104 poor-initialization."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.depth import DepthProfile, change_along_depth, depth_profile
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress, severity, standing_still
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When the scale of the weights is what makes a gradient vanish or explode."""

    # The same change along depth as GS101's and GS102's.
    change: float = 1e3
    extreme_change: float = 1e6
    # Weights within a factor 1.5 of the right scale are not what is wrong: the classical
    # schemes (LeCun, Xavier, He) differ among each other by √2.
    min_scale_error: float = 1.5
    # Setting the weights right would remove at least this share of the change (in logs). Else
    # the scale is not the cause: of a sigmoid's decay, say.
    min_share_explained: float = 0.65
    # Initialization is what the first steps show.
    latest_step: int = 10
    # Outputs that start this large make a loss that falls by their shrinking alone: its fall
    # clears nothing. At the right scale they start near 1.
    inflated_output: float = 100.0


# σ_w = std(w)·√fan_in at which the gradient keeps its size: He et al. 2015 for the rectifiers;
# 1 for what is the identity near zero. No scale does that for a sigmoid or softplus
# (Schoenholz et al. 2017): not listed, so that it is not blamed on the weights.
_GAINS = {
    "ReLU": math.sqrt(2.0),
    "LeakyReLU": math.sqrt(2.0),
    "ReLU6": math.sqrt(2.0),
    "GELU": math.sqrt(2.0),
    "SiLU": math.sqrt(2.0),
    "Mish": math.sqrt(2.0),
    "PReLU": math.sqrt(2.0),
    "ELU": 1.0,
    "CELU": 1.0,
    "SELU": 1.0,
    "Tanh": 1.0,
    "Hardtanh": 1.0,
    "Softsign": 1.0,
    "Identity": 1.0,
}
_SCHEME = {
    True: "nn.init.kaiming_normal_(weight, nonlinearity='relu')",
    False: "nn.init.xavier_normal_(weight)",
}


@rule(
    "GS104",
    name="poor-initialization",
    requires=("modules.output_grad_norm", "parameters.weight_rms"),
    limits=Limits(),
)
def poor_initialization(run: Run, limits: Limits) -> Iterator[Finding]:
    """The weights start at a scale that makes every layer shrink or enlarge the gradient.

    ## What it measures
    In the first steps: the factor per layer by which the gradient changes on its way back, and
    the scale σ_w = rms(w)·√fan_in of the weights. If the gradient changes much over the depth,
    the scale is off, and weights of the right scale for the activation (√2 for rectifiers, 1
    for tanh) would remove most of the change, then the initialization is the cause.

    ## Why it matters
    A factor per layer acts to the power of the depth: 0.4 over twenty layers leaves 1e-8 of the
    gradient, 5.7 makes 1e15 of it. The right scale costs one line before training.

    ## How sure it is
    Likely: the scale is measured, and that another one would mend it is calculated from a
    theory of wide layers, not tried; `gradscope.compare` tries it.

    ## Known limits
    The first steps of a fine-tuning are judged like an initialization. Needs four layers with
    weights in a chain. Where no activation was seen, a rectifier is assumed. Networks that
    normalize in every block do not depend on the scale and are not judged by it: their gradient
    keeps its size.

    ## Example
    `nn.init.normal_(layer.weight)` on twenty layers of width 64: σ_w = 8 where ReLU needs 1.41.
    Do instead: `nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')`.

    ## References
    Glorot & Bengio 2010 (AISTATS), section 4.2; He et al. 2015 (ICCV), section 2.2; Schoenholz et
    al. 2017 (ICLR), section 3; Mishkin & Matas 2016 (ICLR).
    """
    profile = depth_profile(run)
    if profile.steps[0] > limits.latest_step:
        message = f"the first steps were not recorded, only from step {profile.steps[0]} on"
        raise UnjudgedError(message)
    growth = float(profile.growth[0])
    change, factor = 10**growth, profile.factor(growth)
    if abs(math.log(change)) < math.log(limits.change):
        return
    activation = _activation(run.modules.entities)
    scale = _typical_scale(run, profile)
    if activation not in _GAINS or scale is None:
        return
    gain = _GAINS[activation]
    error = scale / gain
    off = abs(math.log(error)) >= math.log(limits.min_scale_error)
    # The factor per layer is in proportion to the scale: what would it be with the right one?
    remaining = abs(math.log(factor / error)) / abs(math.log(factor))
    if not off or remaining > 1 - limits.min_share_explained:
        return
    loss = progress(run)
    extreme = abs(math.log(change)) > math.log(limits.extreme_change)
    still = bool(standing_still(run).any())
    first, step = profile.layers[0], int(profile.steps[0])
    small_or_large = "large" if error > 1 else "small"
    message = (
        f"The weights start {number(max(error, 1 / error))} times too {small_or_large} for "
        f"{activation} (σ_w = {number(scale)}, {number(gain)} keeps the gradient's size): it "
        f"changes by a factor {number(factor)} per layer over "
        f"{len(profile.layers)} layers; {loss.words}."
    )
    level = severity(loss, still=still, extreme=extreme)
    if _output_rms(run, profile) >= limits.inflated_output:
        level = max(level, Severity.WARNING)
    yield poor_initialization.finding(
        level,
        first.name,
        message,
        evidence=(
            Evidence("σ_w = weight_rms·√fan_in (median)", None, step, step, scale, gain),
            change_along_depth(change, profile.steps[:1], limits.change),
        ),
        remedies=(
            f"Before training: {_SCHEME[gain > 1]} for the weight of every linear and "
            "convolutional layer, zeros for the biases.",
            "Or make the scale not matter: nn.LayerNorm or nn.BatchNorm in every block, with "
            "residual connections.",
        ),
    )


def _output_rms(run: Run, profile: DepthProfile) -> float:
    """The root mean square of the last layer's output at the profile's first step."""
    at = int(np.searchsorted(run.modules.steps, profile.steps[0]))
    last = run.modules.names.index(profile.layers[-1].name)
    return float(np.nan_to_num(run.modules["output_rms"][at, last]))


def _activation(entities: tuple[Entity, ...]) -> str:
    """The type of most activations; where none was seen, they are mostly rectifiers."""
    types = [entity.type for entity in entities if entity.group == "activation"]
    return max(set(types), key=lambda name: (types.count(name), name)) if types else "ReLU"


def _typical_scale(run: Run, profile: DepthProfile) -> float | None:
    """The median of rms(w)·√fan_in over the layers of the profile, at its first step."""
    table = run.parameters
    at = int(np.searchsorted(table.steps, profile.steps[0]))
    scales = []
    for layer in profile.layers:
        name = f"{layer.name}.weight"
        if name in table.names:
            index = table.names.index(name)
            rms = float(table["weight_rms"][at, index])
            scales.append(rms * math.sqrt(_fan_in(table.entities[index])))
    known = [scale for scale in scales if math.isfinite(scale) and scale > 0]
    return float(np.median(known)) if known else None


def _fan_in(entity: Entity) -> int:
    # A transposed convolution has its inputs first.
    inputs_first = "Transpose" in entity.type or entity.type == "Conv1D"
    kernel = math.prod(entity.shape[2:])
    return max(1, entity.shape[0 if inputs_first else 1] * kernel)
