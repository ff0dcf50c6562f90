"""GS107 exploding-through-time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.along_time import TimeProfile, time_profiles
from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import progress, severity
from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as exploded through time."""

    # The first time step's gradient over the last's: the same 1e3 as GS102's along depth.
    growth: float = 1e3
    # Where the loss reads every output the first step hears from all of them, up to T times as
    # much as the last: ten times that is more than their sum.
    per_time_step: float = 10.0
    # Without a loss that is stuck only what no learning rate survives counts, as in GS102.
    extreme_growth: float = 1e6
    # It may pass during training: half of the measurements.
    min_share_of_steps: float = 0.5


@rule(
    "GS107",
    name="exploding-through-time",
    requires=("modules.time_grad_first", "modules.time_grad_last"),
    limits=Limits(),
)
def exploding_through_time(run: Run, limits: Limits) -> Iterator[Finding]:
    """The gradient grows on its way back through time.

    ## What it measures
    The norm of the total gradient at the first time step of recurrent layers over that at the
    last, on those of the recorded steps on which it was measured; and whether it overflowed
    though what arrived at the output was finite.

    ## Why it matters
    The state is multiplied by the same Jacobian at every time step. Where that enlarges, the
    gradient of the weights is that of the earliest inputs, and a step along it throws the state
    elsewhere: the loss jumps between walls, or the numbers leave the range of the dtype.

    ## How sure it is
    Certain that the gradient grows. That it breaks the training is likely.

    ## Known limits
    Clipping and Adam can hold it: without a stuck or non-finite loss a growth below a million is
    information.

    ## Example
    `nn.init.normal_(rnn.weight_hh_l0, std=0.3)` in a `nn.RNN` of width 64: a spectral radius of
    2.4. Do instead: `nn.init.orthogonal_(rnn.weight_hh_l0)`, and `scope.clip_grad_norm_(1.0)`.

    ## References
    Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013 (ICML), sections 2 and 3.2.
    """
    found = [
        (_typical(profile, limits), profile)
        for profile in time_profiles(run)
        if (_grows(profile, limits) | profile.overflows).mean() >= limits.min_share_of_steps
    ]
    if not found:
        return
    growth, profile = max(found, key=lambda each: (each[0], each[1].entity.name))
    loss = progress(run)
    exploded = _grows(profile, limits) | profile.overflows
    steps, overflows = profile.steps[exploded], int(profile.overflows.sum())
    name = layer_in_words(profile.entity.name)
    way = f"on its way back through {number(profile.time_steps)} time steps of {name}"
    beyond = f", and overflows in {overflows} of them" if overflows else ""
    how = (
        f"overflows {way}"
        if math.isinf(growth)
        else f"grows {number(10**growth)}-fold {way}, {number(profile.per_step(growth))} per step"
    )
    overflow = Evidence(
        "time_grad_nonfinite (measurements)",
        profile.entity.name,
        int(steps[0]),
        int(steps[-1]),
        float(overflows),
        0.0,
    )
    yield exploding_through_time.finding(
        severity(loss, still=False, extreme=growth >= np.log10(limits.extreme_growth)),
        profile.entity.name,
        f"The gradient {how}, in {len(steps)} of {len(profile.steps)} measurements"
        f"{'' if math.isinf(growth) else beyond}; {loss.words}.",
        evidence=(
            profile.evidence(exploded, growth, limits.growth),
            *((overflow,) if overflows else ()),
        ),
        remedies=(
            f"Initialize weight_hh of {name.partition('#')[0]} with nn.init.orthogonal_: it keeps "
            "the state's size.",
            "Clip: scope.clip_grad_norm_(1.0) before optimizer.step().",
            "Cut the sequence into shorter ones (truncated backpropagation), or use an LSTM or "
            "GRU, whose state is bounded.",
        ),
    )


def _grows(profile: TimeProfile, limits: Limits) -> Bools:
    limit = np.log10(max(limits.growth, limits.per_time_step * profile.time_steps))
    grows: Bools = (profile.growth > limit) & profile.is_steady
    return grows


def _typical(profile: TimeProfile, limits: Limits) -> float:
    """The median decades of the measurements in which it grows; infinite if it only overflows."""
    grows = _grows(profile, limits)
    return float(np.median(profile.growth[grows])) if grows.any() else math.inf
