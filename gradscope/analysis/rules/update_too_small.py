"""GS402 update-too-small."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import LossVerdict, progress, severity
from gradscope.analysis.layers import module_of
from gradscope.analysis.robust import F64, Bools, measured, median
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import Updates, spans, updates
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When updates count as too small."""

    # A net whose liveliest weight has moved by less than this share of itself computes what it
    # computed at first. F24 (SGD, 1e-5) moves by 2e-4; a fine-tuning that learns by 1e-2.
    moved: float = 1e-2
    # The least improvement that counts as one (design): updates that could not have bought it
    # even if the loss had fallen along its slope all the way.
    bought: float = 0.01
    # A training that has just begun has not moved yet.
    min_steps: int = 100


# Learning layers move by 1e-2 to 1e-4 of themselves in a step (measured on healthy runs).
_TYPICAL = 1e-3
# Beyond this the first guess is no better than "a lot".
_LARGEST_FACTOR = 1e6


@rule(
    "GS402",
    name="update-too-small",
    requires=("parameters.update_norm",),
    limits=Limits(),
)
def update_too_small(run: Run, limits: Limits) -> Iterator[Finding]:
    """The steps are so small that in effect nothing moves.

    ## What it measures
    Over the whole run: how far the liveliest weight moved relative to itself, and by how much the
    updates could have lowered the loss at best, −⟨gradient, update⟩ added up over all parameters
    and steps. If the loss is stuck, that weight moved by less than a hundredth, and the updates
    could not have lowered the loss by 1 %, then the steps are what holds it up.

    ## Why it matters
    A loss that does not move looks like a fault of the model or the data. Here nothing has been
    tried yet: the weights are those that were drawn at the start.

    ## How sure it is
    Likely: how far the weights came and what the steps could have gained are measured; that
    larger ones would gain more is an estimate to first order.

    ## Known limits
    Silent while the learning rate rises, where the loss falls however slowly, and in the first
    hundred steps. A fine-tuning that starts at its best loss with a very small learning rate and
    stays there can't be told from one that does not move. Weights whose gradient is exactly zero
    are GS003's.

    ## Example
    `torch.optim.SGD(model.parameters(), lr=1e-5)` on a classifier with gradients of order 1: each
    step changes the weights by a millionth. Do instead: `lr=0.1`, or Adam with `lr=1e-3`.

    ## References
    Goodfellow, Bengio & Courville 2016, section 11.4 ("not 0.001 percent"); Karpathy, cs231n,
    "ratio of weights : updates"; Humbatova et al. 2020 (ICSE), learning rates in the taxonomy of
    faults.
    """
    if len(run.steps) < limits.min_steps:
        message = f"{count(len(run.steps), 'step')}, {limits.min_steps} are needed"
        raise UnjudgedError(message)
    loss = progress(run)
    if loss.verdict is not LossVerdict.STUCK:
        return
    small = updates(run)
    alive = _reached(run, small)
    if not alive.any():
        return
    distance = np.where(alive, _distance(small), -np.inf)
    liveliest = int(np.argmax(distance))
    moved = float(distance[liveliest])
    if moved >= limits.moved:
        return
    bought = _bought(run) / max(abs(loss.start), np.finfo(np.float64).tiny)
    if bought >= limits.bought:
        return
    name = small.entities[liveliest].name
    typical = float(np.median(median(small.sizes[:, alive], axis=0)))
    first, last = int(small.steps[0]), int(small.steps[-1])
    yield update_too_small.finding(
        severity(loss, still=False, extreme=True),
        module_of(name),
        f"In {count(len(run.steps), 'step')}{_rate_in_words(run)} the weight that moved most, that "
        f"of {layer_in_words(module_of(name))}, changed by {share(moved)} of itself; the updates "
        f"could have lowered the loss by {share(max(bought, 0.0))} at best, and {loss.words}.",
        evidence=(
            Evidence(
                "update_ratio",
                name,
                first,
                last,
                moved / len(run.steps),
                limits.moved / len(run.steps),
            ),
            Evidence("Σ −⟨gradient, update⟩ / loss", None, first, last, bought, limits.bought),
        ),
        remedies=_remedies(run, typical),
    )


def _reached(run: Run, small: Updates) -> Bools:
    """Per weight: whether its gradient was ever other than zero."""
    other = (run.parameters["grad_norm"] > 0).any(axis=0)
    reached = {run.parameters.names[index] for index in np.flatnonzero(other)}
    return np.array([entity.name in reached for entity in small.entities], dtype=bool)


def _distance(small: Updates) -> F64:
    """Per weight: the lengths of its steps added up, relative to itself."""
    known = np.where(measured(small.sizes), small.sizes, 0.0)
    total: F64 = (known * small.spans[:, None]).sum(axis=0)
    return total


def _bought(run: Run) -> float:
    """The fall of the loss that the updates promise to first order, over all parameters."""
    table = run.parameters
    gradient, update, cosine = (
        table[name].astype(np.float64)
        for name in ("grad_norm", "update_norm", "update_gradient_cosine")
    )
    with np.errstate(invalid="ignore"):
        # What float32 could not hold is infinite; of infinity times zero nothing is known.
        promised = np.nansum(-gradient * update * cosine, axis=1)
    return float((promised * spans(run)).sum())


def _rates(run: Run) -> F64:
    """The learning rates that were seen."""
    rates = run.scalars["learning_rate"].astype(np.float64)
    return rates[measured(rates)]


def _collapsed(rates: F64) -> bool:
    """Whether it is no longer a thousandth of what it was."""
    return bool(rates.size and rates[-1] < rates[0] / 1e3)


def _rate_in_words(run: Run) -> str:
    rates = _rates(run)
    if not rates.size:
        return ""
    if _collapsed(rates):
        return f" at a learning rate that fell from {number(rates[0])} to {number(rates[-1])}"
    return f" at a learning rate of {number(float(np.median(rates)))}"


def _remedies(run: Run, typical: float) -> tuple[str, ...]:
    rates = _rates(run)
    if _collapsed(rates):
        first = (
            "Let the learning rate fall later and slower: check how often scheduler.step() is "
            "called, and what it counts."
        )
    elif typical == 0:
        first = "Raise the learning rate: 0.1 for SGD and 1e-3 for Adam are where searches begin."
    else:
        factor = min(10.0 ** round(math.log10(_TYPICAL / typical)), _LARGEST_FACTOR)
        rate = float(np.median(rates)) if rates.size else 0.0
        to = f": {number(rate)} → {number(rate * factor)}" if rate else ""
        first = f"Raise the learning rate about {number(factor)}-fold{to}."
    return (
        first,
        "Look for a factor that makes the loss, and with it SGD's steps, small: a weight of the "
        "loss, a mean over too much, a target in tiny units.",
        "Use Adam (lr=1e-3): its steps do not depend on the size of the gradient.",
    )
