"""GS102 exploding-gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.depth import change_along_depth, depth_profile
from gradscope.analysis.finding import Finding
from gradscope.analysis.harm import progress, severity
from gradscope.analysis.rule import rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as exploded."""

    # First layers' gradient over the last layers'. AUTOTRAINER's β3 is 70, but healthy
    # residual nets reach 10 to 50 at their input layer: a decade and a half of distance.
    growth: float = 1e3
    # Without a loss to judge by, only a growth that no learning rate survives counts.
    extreme_growth: float = 1e6
    min_share_of_steps: float = 0.5


@rule("GS102", name="exploding-gradient", requires=("modules.output_grad_norm",), limits=Limits())
def exploding_gradient(run: Run, limits: Limits) -> Iterator[Finding]:
    """The gradient grows on its way back, layer by layer.

    ## What it measures
    The norm of the gradient arriving at the output of each layer with weights, in order of
    execution: the first over the last, by the trend through the medians of the thirds, at every
    recorded step whose gradients were finite.

    ## Why it matters
    Where each layer's Jacobian enlarges the gradient, the early layers are torn about by updates
    that are too large for them at any learning rate that the late layers need; soon the numbers
    leave the range of the dtype.

    ## How sure it is
    Certain that the gradient grows. That it breaks the training is likely, where the loss is
    stuck or has ended.

    ## Known limits
    Growth along depth only. A gradient that grows from step to step is GS207
    gradient-norm-growth. Without a stuck or non-finite loss it is only information: clipping
    and Adam can hold it.

    ## Example
    Twenty `nn.Linear(64, 64)` + `nn.ReLU` with weights from N(0, 1): each layer enlarges the
    gradient by √(64/2) = 5.7, the first gets 1e14 times the last. Do instead:
    `nn.init.kaiming_normal_`, whose factor is 1.

    ## References
    Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013 (ICML), section 2; He et al.
    2015 (ICCV), section 2.2; Zhang et al. 2021 (AUTOTRAINER, ICSE), section 3.
    """
    profile = depth_profile(run)
    exploded = profile.growth > np.log10(limits.growth)
    if exploded.mean() < limits.min_share_of_steps:
        return
    logarithm = float(np.median(profile.growth[exploded]))
    growth = 10**logarithm
    loss = progress(run)
    first = profile.layers[0].name
    steps = profile.steps[exploded]
    message = (
        f"The gradient grows {number(growth)}-fold on its way back through "
        f"{len(profile.layers)} layers, {number(profile.factor(logarithm))} per layer; "
        f"{loss.words}."
    )
    yield exploding_gradient.finding(
        severity(loss, still=False, extreme=growth > limits.extreme_growth),
        first,
        message,
        evidence=(change_along_depth(growth, steps, limits.growth),),
        remedies=(
            "Initialize for the activation: nn.init.kaiming_normal_(weight, nonlinearity='relu') "
            "behind ReLU, nn.init.xavier_normal_(weight) behind tanh.",
            "Normalize inside the blocks (nn.LayerNorm, nn.BatchNorm): that fixes the scale at "
            "every layer.",
            "Clip as a stopgap: scope.clip_grad_norm_(1.0) before optimizer.step().",
        ),
    )
