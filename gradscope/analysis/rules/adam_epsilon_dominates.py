"""GS404 adam-epsilon-dominates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import progress, severity, standing_still
from gradscope.analysis.layers import module_of
from gradscope.analysis.optimizers import optimizers, rates_when_recorded
from gradscope.analysis.robust import F64, measured, median, most
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When ε counts as what Adam divides by."""

    # Of a weight's entries, of the weights, and of the steps: most (ε is meant to be below √v̂ in
    # all but a few; Wortsman et al. 2023, section 3.4).
    most: float = 0.5
    # Adam's step is about the learning rate per entry, and a few tenths of it where the gradients
    # are noise (Kingma & Ba 2015, section 2.1): this is what ε takes, not noise.
    slowed: float = 0.1
    # √v̂ needs a few gradients.
    min_steps: int = 5


@rule(
    "GS404",
    name="adam-epsilon-dominates",
    requires=("parameters.epsilon_share", "parameters.update_norm"),
    limits=Limits(),
)
def adam_epsilon_dominates(run: Run, limits: Limits) -> Iterator[Finding]:
    """Adam divides by its ε in place of the gradient's size, and its steps shrink with it.

    ## What it measures
    The share of a weight's coordinates in which √v̂, Adam's running size of the gradient, is below
    ε; for most of the weights that get a gradient, in most recorded steps. And the length of the
    steps per entry over the learning rate, which is their size without ε.

    ## Why it matters
    Adam's steps do not depend on the size of the gradient: that is its use. Below ε they do again:
    the step is the gradient times lr/ε, and a gradient a hundred times smaller than ε makes a step
    a hundred times smaller than the learning rate says.

    ## How sure it is
    Certain that ε is larger than the gradients. That the steps are too small for it is likely,
    where the loss is stuck.

    ## Known limits
    A large ε is chosen on purpose (0.1 for Inception, 1e-5 in reinforcement learning), and works
    with a learning rate to match; so without harm it is information. Gradients that are exactly
    zero, and embeddings, most of whose rows rest, are not judged. A converged model's gradients
    sink below ε, and should.

    ## Example
    A loss in units of 1e-9, or `Adam(eps=1.0)` with gradients of 1e-3. Do instead: `eps=1e-8`, and
    a loss of order 1.

    ## References
    Kingma & Ba 2015 (arXiv:1412.6980), section 2; Wortsman et al. 2023 (arXiv:2309.14322),
    section 3.4, on gradients that sink to ε in large models; Choi et al. 2019 (arXiv:1910.05446),
    on the choice of ε.
    """
    table = run.parameters
    alive = held_weights(run) & (table["grad_norm"] > 0).any(axis=0)
    below = np.where(table["grad_norm"] > 0, table["epsilon_share"].astype(np.float64), np.nan)
    alive &= measured(below).any(axis=0)
    known = measured(below[:, alive]).any(axis=1) if alive.any() else np.zeros(0, dtype=bool)
    if known.sum() < limits.min_steps:
        message = f"ε was held against a gradient in fewer than {limits.min_steps} steps"
        raise UnjudgedError(message)
    below = below[:, alive]
    dominated = most(below > limits.most, below, axis=1)
    if dominated[known].mean() <= limits.most:
        return
    length = _length(run)[:, alive]
    sizes = length[dominated]
    sizes = sizes[measured(sizes)]
    slowed = float(np.median(sizes)) if sizes.size else math.inf
    if slowed >= limits.slowed:
        return
    loss = progress(run)
    still = bool((standing_still(run) & alive).any())
    steps = run.recorded_steps[dominated]
    first, last = int(steps[0]), int(steps[-1])
    names = [table.names[column] for column in np.flatnonzero(alive)]
    each = median(below, axis=0)
    worst = int(np.nanargmax(each))
    eps = next((s.number("eps") for s in optimizers(run) if s.is_adam), math.nan)
    of = "" if math.isnan(eps) else f" of {number(eps)}"
    portion = share(float(np.nanmedian(below[dominated])))
    yield adam_epsilon_dominates.finding(
        severity(loss, still=still, extreme=False),
        module_of(names[worst]),
        f"In {share(float(dominated[known].mean()))} of the recorded steps Adam's √v̂ is below its "
        f"ε{of} in {portion} of the typical weight (in {layer_in_words(module_of(names[worst]))} "
        f"most), and its steps are {number(slowed)} of the learning rate per entry; "
        f"{loss.words}.",
        evidence=(
            Evidence("epsilon_share", names[worst], first, last, float(each[worst]), limits.most),
            Evidence("rms(Δw) / learning rate", None, first, last, slowed, limits.slowed),
        ),
        remedies=_remedies(run, eps),
    )


def _length(run: Run) -> F64:
    """Per step and parameter: the root mean square of the change over the learning rate."""
    sizes = np.sqrt([max(entity.numel, 1) for entity in run.parameters.entities])
    rate = rates_when_recorded(run)
    with np.errstate(divide="ignore", invalid="ignore"):
        length: F64 = (
            run.parameters["update_norm"] / sizes / np.where(rate > 0, rate, np.nan)[:, None]
        )
    return length


def _remedies(run: Run, eps: float) -> tuple[str, ...]:
    gradient = float(np.nanmedian(run.parameters["grad_rms"])) if _any_rms(run) else math.nan
    to = "1e-8" if not eps <= 1e-8 else number(eps / 1e4)  # noqa: PLR2004  (PyTorch's default)
    size = (
        "" if math.isnan(gradient) else f"; entries of the gradients are about {number(gradient)}"
    )
    return (
        f"Set eps={to} in the optimizer{size}.",
        "Look for a factor that makes the loss, and all gradients with it, small: a weight of the "
        "loss, a mean over too much, a target in tiny units.",
    )


def _any_rms(run: Run) -> bool:
    return bool(measured(run.parameters["grad_rms"]).any())
