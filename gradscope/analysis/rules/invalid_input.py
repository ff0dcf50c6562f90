"""GS607 invalid-input."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import BINARY, LIKELIHOODS, Graph, loss_graph
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.robust import Bools
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import Signal, signal
from gradscope.analysis.words import count, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an entry of the data counts as invalid."""

    # Arithmetic passes one NaN on to all that it meets (IEEE 754).
    entries: int = 1
    # Labels that were smoothed or interpolated reach beyond [0, 1] by rounding in float16.
    rounding: float = 1e-3


# What F.cross_entropy passes over unless it is told another.
_IGNORED = -100


@rule("GS607", name="invalid-input", requires=("signals.nonfinite",), limits=Limits())
def invalid_input(run: Run, limits: Limits) -> Iterator[Finding]:
    """The data hold NaN or infinity, or targets that the loss has no value for.

    ## What it measures
    In the model's input and in the target, of the recorded steps: entries that are NaN or
    infinite; class indices that are negative or not below the number of classes; targets of a
    binary cross-entropy outside [0, 1].

    ## Why it matters
    A NaN in one sample is in the loss of its batch, in every gradient, and after one step in
    every weight. Beyond [0, 1] a binary cross-entropy has no lower bound: the net is rewarded for
    running away.

    ## How sure it is
    Certain: the entries are counted. Of batches that were not recorded nothing is known.

    ## Known limits
    Missing values that the model or the loss masks do no harm, and are information. Only recorded
    batches are seen: `every=1` sees all. `ignore_index` is no class.

    ## Example
    A CSV file with empty cells, read with `pandas.read_csv`. Do instead: drop or impute them, and
    assert `torch.isfinite(x).all()` where the data are loaded; labels of -1 and 1 to 0 and 1.

    ## References
    IEEE 754-2019, section 6.2; PyTorch's reference of `torch.nn.CrossEntropyLoss` and
    `torch.nn.BCEWithLogitsLoss`.
    """
    signals = [found for name in ("input", "target") if (found := signal(run, name)) is not None]
    if not signals:
        message = "neither the model's input nor the target was seen"
        raise UnjudgedError(message)
    for given in signals:
        yield from _nonfinite(run, given, limits)
    target = signal(run, "target")
    if target is not None:
        yield from _out_of_range(run, target, limits)


def _nonfinite(run: Run, given: Signal, limits: Limits) -> Iterator[Finding]:
    counts = np.nan_to_num(given["nonfinite"])
    bad = np.flatnonzero(counts >= limits.entries)
    if not bad.size:
        return
    name = given.entity.name
    first, last = int(given.steps[bad[0]]), int(given.steps[bad[-1]])
    severity, then = _what_broke(run, first)
    batches = f"{bad.size} of {count(int((~np.isnan(given['nonfinite'])).sum()), 'recorded step')}"
    yield invalid_input.finding(
        severity,
        None,
        f"The {name} held {number(float(counts[bad[0]]))} NaN or infinite entries at step {first}, "
        f"and some at {batches}; {then}.",
        evidence=(
            Evidence("nonfinite", name, first, last, float(counts[bad[0]]), float(limits.entries)),
        ),
        remedies=(
            f"Find them where the data are loaded: assert torch.isfinite({name}).all(); empty "
            "cells, divisions by a standard deviation of zero, logarithms of zero.",
            "Drop these samples or impute the values, and go back to a checkpoint from before "
            f"step {first}: weights that are NaN do not recover.",
        ),
    )


def _what_broke(run: Run, step: int) -> tuple[Severity, str]:
    """What became of the training from this step on."""
    later = run.steps >= step
    recorded = run.parameters.steps >= step
    entries = np.nan_to_num(run.parameters["grad_nonfinite"][recorded])
    gradients: Bools = np.asarray((entries > 0).any(axis=1))
    losses = run.scalars["loss_nonfinite"][later] > 0
    if progress(run).verdict is LossVerdict.NONFINITE or (gradients.size and gradients[-1]):
        return Severity.ERROR, "the loss or the gradients are no finite numbers since"
    if losses.any() or gradients.any():
        return Severity.WARNING, "the loss or a gradient broke, and came back"
    return Severity.INFO, "the loss and the gradients stayed finite: they seem to be masked"


def _out_of_range(run: Run, target: Signal, limits: Limits) -> Iterator[Finding]:
    try:
        graph = loss_graph(run)
    except UnjudgedError:
        return
    found = _beyond_classes(graph, target) or _beyond_probabilities(graph, target, limits)
    if found is None:
        return
    words, quantity, limit, remedy = found
    values = target[quantity]
    beyond = values > limit if quantity == "max" else values < limit
    step = int(target.steps[np.flatnonzero(beyond)[0]])
    worst = float(np.nanmax(values) if quantity == "max" else np.nanmin(values))
    loss = progress(run)
    ran_away = loss.failed or loss.verdict is LossVerdict.NONFINITE or loss.end < 0
    yield invalid_input.finding(
        Severity.ERROR if ran_away or "class" in words else Severity.WARNING,
        None,
        f"The target reaches {number(worst)}, first at step {step}: {words}; {loss.words}.",
        evidence=(Evidence(quantity, "target", step, int(target.steps[-1]), worst, limit),),
        remedies=(remedy,),
    )


_Beyond = tuple[str, str, float, str]


def _beyond_classes(graph: Graph, target: Signal) -> _Beyond | None:
    """Class indices outside 0 … C - 1."""
    for index in graph.find(*LIKELIHOODS):
        node = graph.nodes[index]
        given = graph.nodes[node.inputs[0]] if node.inputs and node.inputs[0] >= 0 else node
        if not given.shape:
            continue
        classes = given.shape[min(1, len(given.shape) - 1)]
        ignored = node.number("ignore_index")
        passed_over = {_IGNORED if ignored is None else ignored}
        for quantity, limit, wrong in (
            ("max", classes - 1, target["max"] > classes - 1),
            ("min", 0, target["min"] < 0),
        ):
            if set(target[quantity][wrong].tolist()) - passed_over:
                words = f"the loss has {classes:,} classes, from 0 to {classes - 1:,}"
                remedy = (
                    "Number the classes from 0, and give the last layer one unit for each; what "
                    "is to be passed over gets the loss's ignore_index."
                )
                return words, quantity, float(limit), remedy
    return None


def _beyond_probabilities(graph: Graph, target: Signal, limits: Limits) -> _Beyond | None:
    """Targets of a binary cross-entropy outside [0, 1]."""
    if next(graph.find(*BINARY), None) is None:
        return None
    words = "beyond [0, 1] a binary cross-entropy has no lower bound"
    remedy = "Map the labels to 0 and 1, as (target > 0).float(); or use a loss for numbers."
    if (target["max"] > 1 + limits.rounding).any():
        return words, "max", 1.0, remedy
    if (target["min"] < -limits.rounding).any():
        return words, "min", 0.0, remedy
    return None
