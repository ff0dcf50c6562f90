"""GS106 vanishing-through-time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.along_time import TimeProfile, time_profiles
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.losses import losses
from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a gradient counts as vanished through time."""

    # The first time step's gradient over the last's: the same 1e-3 as GS101's along depth. An
    # LSTM of PyTorch's default initialization gets there within some twenty steps.
    decay: float = 1e-3
    # Where the loss is too noisy to be called stuck: 1e-3 squared, as in GS101.
    extreme_decay: float = 1e-6
    # Memory may open during training: half of the measurements.
    min_share_of_steps: float = 0.5


@rule(
    "GS106",
    name="vanishing-through-time",
    requires=("modules.time_grad_first", "modules.time_grad_last"),
    limits=Limits(),
)
def vanishing_through_time(run: Run, limits: Limits) -> Iterator[Finding]:
    """The gradient fades on its way back through time: early inputs are not learned from.

    ## What it measures
    The norm of the total gradient at the first time step of recurrent layers over that at the
    last, on those of the recorded steps on which it was measured.

    ## Why it matters
    The state is multiplied by the same Jacobian at every time step. Where that shrinks, what
    happened long ago does not reach the loss's gradient, and dependencies over more than a few
    steps can't be learned. Gradients of weights don't show it: the late steps dominate them.

    ## How sure it is
    Certain that the gradient fades. That the task needs the early steps is possible: nothing
    that is recorded tells.

    ## Known limits
    A task that needs no long memory is learned all the same: it is information unless the loss
    gets nowhere. That the two belong together is not proven even then, so that it is a warning
    at most. Where the loss reads every output, each step has a gradient of its own, and the
    ratio says little.

    ## Example
    `nn.RNN(1, 32)` over 60 steps with a recurrent weight of spectral radius 0.5: 1e-19 of the
    gradient is left for the first input. Do instead: `nn.init.orthogonal_(rnn.weight_hh_l0)`, an
    LSTM with a forget bias of 1, attention.

    ## References
    Hochreiter 1991; Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013 (ICML),
    section 2; Le, Jaitly & Hinton 2015 (arXiv:1504.00941).
    """
    loss = progress(run)
    found = [
        (profile, growth) for profile in time_profiles(run) if (growth := _fades(profile, limits))
    ]
    if not found:
        return
    profile, growth = min(found, key=lambda each: (each[1], each[0].entity.name))
    vanished = _vanished(profile, limits)
    name = layer_in_words(profile.entity.name)
    left = "less than its dtype holds" if profile.has_zeros[vanished].all() else number(10**growth)
    yield vanishing_through_time.finding(
        _severity(run, loss, growth, limits),
        profile.entity.name,
        f"Of the gradient at the last of {number(profile.time_steps)} time steps of {name}, {left} "
        f"is left at the first, a factor {number(profile.per_step(growth))} per step; "
        f"{loss.words}.",
        evidence=(profile.evidence(vanished, growth, limits.decay),),
        remedies=_remedies(profile.entity.name, profile.entity.type),
    )


def _vanished(profile: TimeProfile, limits: Limits) -> Bools:
    vanished: Bools = (profile.growth < np.log10(limits.decay)) & profile.is_steady
    return vanished


def _fades(profile: TimeProfile, limits: Limits) -> float | None:
    """The median decades of the measurements in which it vanished, if they are most."""
    vanished = _vanished(profile, limits)
    if vanished.mean() < limits.min_share_of_steps:
        return None
    return float(np.median(profile.growth[vanished]))


def _severity(run: Run, loss: Progress, growth: float, limits: Limits) -> Severity:
    if loss.failed:
        return Severity.WARNING
    if loss.verdict is LossVerdict.UNKNOWN and growth < np.log10(limits.extreme_decay):
        try:
            flat = losses(run, 1).is_flat
        except UnjudgedError:
            flat = False
        return Severity.WARNING if flat else Severity.INFO
    return Severity.INFO


def _remedies(name: str, kind: str) -> tuple[str, ...]:
    part = name.partition("#")[0]
    keep = (
        f"Start the memory open: fill the forget gate's quarter of {part}'s bias_ih with 1 to 5 "
        "(Jozefowicz et al. 2015: 1; the longer the sequence the more)."
        if "LSTM" in kind
        else f"nn.init.orthogonal_(weight_hh) for {part}, which keeps the state's size, or an LSTM "
        "or GRU, whose gates can."
    )
    return (
        keep,
        "Shorten the way: attention or a mean over all outputs instead of the last one, every "
        "other time step, or a loss at intermediate steps.",
        "Pack padded sequences (nn.utils.rnn.pack_padded_sequence): the last output is else "
        "that of the padding.",
    )
