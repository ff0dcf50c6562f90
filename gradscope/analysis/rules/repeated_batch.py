"""GS010 repeated-batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.optimizers import optimizers
from gradscope.analysis.robust import F64, measured, since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import signal
from gradscope.analysis.words import count
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a batch counts as repeated."""

    # Nearly all: an empty or a last, smaller batch may lie between.
    min_share: float = 0.9
    # Several steps on one batch are common (closures, PPO's epochs); this many are a habit.
    min_pairs: int = 10
    # What varied before, and then no more, for longer than the end of a data set lasts.
    min_share_of_steps: float = 0.2


@rule("GS010", name="repeated-batch", requires=("signals.repeated",), limits=Limits())
def repeated_batch(run: Run, limits: Limits) -> Iterator[Finding]:
    """The model is given the same input in every step.

    ## What it measures
    Whether the model's input is that of the step before, to the bit, in pairs of steps that were
    both recorded: in nine of ten of them, or, where it varied at first, in all from some step on.
    And whether the target is, too.

    ## Why it matters
    A model that sees one batch learns that batch: the loss falls to zero, and nothing else is
    learned. `next(iter(loader))` inside the loop starts the loader anew at every step; without
    shuffling that is always the first batch. If the input is stale while the target goes on, there
    is nothing to learn but the mean.

    ## How sure it is
    Certain that the batch is the same, to the bit. Whether it was meant nobody can see:
    possible.

    ## Known limits
    The same input in every step is also what training on all of a small data set looks like, or
    overfitting one batch to see that a model can: no number tells them from a mistake, so it is
    information. It is a warning where the input varied at first and then stayed the same, with a
    single optimizer; or where it stays the same while the target varies, and the loss is stuck.

    ## Example
    `for step in range(steps): x, y = next(iter(loader))`. Do instead: `for x, y in loader`.

    ## References
    Karpathy 2019, "A Recipe for Training Neural Networks", on overfitting one batch on purpose;
    PyTorch's documentation of `torch.utils.data`, on iterators.
    """
    input_ = _pairs(run, "input")
    known = np.flatnonzero(measured(input_))
    if known.size < limits.min_pairs:
        found = count(known.size, "pair")
        message = f"{found} of steps in a row had a known input, {limits.min_pairs} are needed"
        raise UnjudgedError(message)
    same = input_[known] == 1
    onset = since(same)
    always = float(same.mean()) >= limits.min_share
    needed = max(limits.min_pairs, limits.min_share_of_steps * known.size)
    varied = onset > 0 and float(same[:onset].mean()) <= 1 - limits.min_share
    stopped = varied and known.size - onset >= needed
    if not always and not stopped:
        return
    loss = progress(run)
    target = _pairs(run, "target")
    seen = target[measured(target)]
    stale = seen.size >= limits.min_pairs and float((seen == 1).mean()) <= 1 - limits.min_share
    # A second optimizer may work on all of the data, as L-BFGS after Adam.
    harmed = (stopped and len(optimizers(run)) <= 1) or (always and stale and loss.failed)
    steps = run.signals.steps
    first = int(steps[known[onset]]) if stopped else int(steps[known[0]])
    size = _batch_size(run)
    which = f"a batch of {size}" if size else "its input"
    since_when = f"since step {first}" if stopped else f"in all of {count(known.size, 'pair')}"
    if always and not same.all():
        since_when = f"in {int(same.sum())} of {count(known.size, 'pair')}"
    yield repeated_batch.finding(
        Severity.WARNING if harmed else Severity.INFO,
        None,
        f"The model was given the same input, {which}, as in the step before {since_when}"
        f"{', while the target varied' if stale else ''}; {loss.words}.",
        evidence=(
            Evidence("repeated", "input", first, int(steps[-1]), float(same.mean()), None),
            *(
                (Evidence("repeated", "target", first, int(steps[-1]), float(seen.mean()), None),)
                if stale
                else ()
            ),
        ),
        remedies=(
            "Take the loader's iterator once: for x, y in loader; next(iter(loader)) in the loop "
            "starts it anew.",
            "If all of the data are in this batch, or it is to be overfitted, this is in order.",
        ),
    )


def _pairs(run: Run, name: str) -> F64:
    """Per recorded step: whether the signal is that of the step before; NaN: not known."""
    found = signal(run, name)
    return np.full(len(run.signals.steps), np.nan) if found is None else found["repeated"]


def _batch_size(run: Run) -> int:
    shape = run.signals.entities[run.signals.names.index("input")].shape
    return shape[0] if shape else 0
