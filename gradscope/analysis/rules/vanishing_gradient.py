"""GS101 vanishing-gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.depth import DepthProfile, change_along_depth, depth_profile
from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import progress, severity, standing_still
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as vanished."""

    # First layers' gradient over the last layers': AUTOTRAINER's β1 (ICSE'21), 1e-3.
    decay: float = 1e-3
    # Without a loss to judge by, only a decay that no update survives counts: 1e-3 squared.
    extreme_decay: float = 1e-6
    # A layer may be quiet for a while; half of the recorded steps is not a while.
    min_share_of_steps: float = 0.5


_BOUNDED = frozenset({"Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh", "Softsign", "LogSigmoid"})


@rule("GS101", name="vanishing-gradient", requires=("modules.output_grad_norm",), limits=Limits())
def vanishing_gradient(run: Run, limits: Limits) -> Iterator[Finding]:
    """The gradient fades on its way back, and the early layers hear almost nothing.

    ## What it measures
    The norm of the gradient arriving at the output of each layer with weights, in order of
    execution: the first over the last, by the trend through the medians of the thirds, at every
    recorded step.

    ## Why it matters
    Backpropagation multiplies the gradient by each layer's Jacobian. Where that product shrinks
    at every layer, the early layers get no signal, their weights stay as they were initialized,
    and the later layers must learn from what random features let through.

    ## How sure it is
    Certain that the gradient fades. That this is what holds the training up is likely, where
    the loss is stuck and the first layers stand still; a correlation, not a proof.

    ## Known limits
    A fading gradient is not harm in itself: under Adam small gradients make normal updates, and
    residual networks learn well with tenfold differences. Without a stuck loss or layers that
    stand still it is only information. Recurrent nets fade along time, not depth: not judged
    here.

    ## Example
    Twenty `nn.Linear` + `nn.Sigmoid` with PyTorch's default initialization: each layer passes on
    0.14 of the gradient's norm, the first gets 1e-16 of the last. Do instead: ReLU with He
    initialization, residual connections, normalization.

    ## References
    Hochreiter 1991; Bengio, Simard & Frasconi 1994; Glorot & Bengio 2010 (AISTATS), section 4;
    Schoenholz et al. 2017 (ICLR), section 4; Zhang et al. 2021 (AUTOTRAINER, ICSE), section 3.
    """
    profile = depth_profile(run)
    vanished = profile.growth < np.log10(limits.decay)
    if vanished.mean() < limits.min_share_of_steps:
        return
    growth = float(np.median(profile.growth[vanished]))
    decay = 10**growth
    loss = progress(run)
    still = standing_still(run)
    entities = [run.parameters.entities[index] for index in np.flatnonzero(still)]
    quiet = [entity.name for entity in sorted(entities, key=lambda entity: entity.depth)]
    level = severity(loss, still=bool(quiet), extreme=decay < limits.extreme_decay)
    first = profile.layers[0].name
    steps = profile.steps[vanished]
    moved = f"{len(quiet)} weights in effect stand still" if quiet else "their weights still move"
    message = (
        f"The gradient fades {number(1 / decay)}-fold on its way back through "
        f"{len(profile.layers)} layers, {number(profile.factor(growth))} per layer; {moved}, and "
        f"{loss.words}."
    )
    reached = _first_below(profile, limits.decay)
    yield vanishing_gradient.finding(
        level,
        first,
        message,
        evidence=(
            change_along_depth(decay, steps, limits.decay),
            *(
                Evidence("update_ratio", name, int(steps[0]), int(steps[-1]), ratio)
                for name, ratio in _ratios(run, quiet[:3])
            ),
        ),
        remedies=_remedies(run, reached),
    )


def _first_below(profile: DepthProfile, decay: float) -> str:
    """The last layer, seen from the input, that the gradient no longer reaches."""
    below = np.flatnonzero(profile.relative() < decay)
    # A trend may cross the limit where no single layer does.
    return profile.layers[int(below[-1]) if below.size else 0].name


def _ratios(run: Run, names: list[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        ratios = run.parameters["update_ratio"][:, run.parameters.names.index(name)]
        yield name, float(np.nanmedian(ratios))


def _remedies(run: Run, reached: str) -> tuple[str, ...]:
    bounded = sorted({e.type for e in run.modules.entities if e.type in _BOUNDED})
    activation = (
        f"Replace {' and '.join(bounded)} by ReLU or GELU in the hidden layers: a bounded "
        "activation passes on a fraction of the gradient at every layer.",
    )
    return (
        *(activation if bounded else ()),
        "Initialize for the activation: nn.init.kaiming_normal_(weight, nonlinearity='relu') "
        "behind ReLU, nn.init.xavier_normal_(weight) behind tanh.",
        "Add residual connections around the blocks from the input up to "
        f"{layer_in_words(reached)}, where the gradient is lost, and nn.LayerNorm or "
        "nn.BatchNorm inside them.",
    )
