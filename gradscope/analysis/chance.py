"""The loss of a net that knows nothing, from the graph of its loss."""

import math
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.graph import BINARY, LIKELIHOODS, PARAMETER, Graph, loss_graph
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.signals import signal
from gradscope.record import Run

# As autograd saves `reduction`.
_SUM = 2
_LOSSES = (*LIKELIHOODS, *BINARY)


@dataclass(frozen=True, slots=True)
class Chance:
    """`loss` is ln C, of one term; `terms` are those that the batch has, of `classes` each.

    `summed`: the loss function adds them up instead of averaging. `alone`: nothing is done to
    what it returns, so that a first loss far from `loss` is the model's doing.
    """

    loss: float
    terms: int
    classes: int
    summed: bool
    alone: bool


def chance(run: Run) -> Chance:
    """What guessing costs: ln C of a cross-entropy over C classes, ln 2 of a binary one.

    Raises UnjudgedError where the loss is another, or has further terms.
    """
    graph = loss_graph(run)
    found = [index for index in graph.find(*LIKELIHOODS, *BINARY) if graph.nodes[index].inputs]
    scores = {graph.maker(graph.nodes[index].inputs[0]) for index in found}
    if len(scores) != 1 or -1 in scores:
        message = "the loss is not one cross-entropy: what guessing costs is not known"
        raise UnjudgedError(message)
    if _has_further_terms(graph, scores.pop()):
        message = "the loss has further terms: what guessing costs is not known"
        raise UnjudgedError(message)
    node = graph.nodes[found[0]]
    given = graph.nodes[node.inputs[0]]
    shape = given.shape or ()
    classes = 2 if node.op in BINARY else shape[min(1, len(shape) - 1)] if shape else 0
    if classes < 2 or not given.entries:  # noqa: PLR2004  (one class leaves nothing to guess)
        message = "the shape of what the loss was given is not known"
        raise UnjudgedError(message)
    terms = given.entries if node.op in BINARY else given.entries // classes
    summed = node.number("reduction") == _SUM
    return Chance(math.log(classes), terms, classes, summed, graph.nodes[0].op in _LOSSES)


def of_a_guess(run: Run) -> float:
    """The loss of the best constant prediction; NaN where it is not known.

    Of a mean squared error it is the variance of the targets.
    """
    try:
        known = chance(run)
    except UnjudgedError:
        return _of_a_mean(run)
    return known.loss * (known.terms if known.summed else 1) if known.alone else math.nan


def _of_a_mean(run: Run) -> float:
    target = signal(run, "target")
    try:
        graph = loss_graph(run)
    except UnjudgedError:
        return math.nan
    is_mean = graph.nodes[0].op == "MseLoss" and graph.nodes[0].number("reduction") != _SUM
    return target.typical("std") ** 2 if is_mean and target is not None else math.nan


def _has_further_terms(graph: Graph, scores: int) -> bool:
    """Whether the loss holds a number that is not made of these scores: a penalty, say."""
    return any(
        graph.nodes[index].shape == () and graph.nodes[index].op != PARAMETER
        for index in set(graph.head) - graph.above(scores)
    )


def first_loss(run: Run) -> float:
    """The loss of step 0. Raises UnjudgedError where it was not seen, or is not finite."""
    loss = run.scalars["loss"]
    if not run.steps.size or run.steps[0] != 0 or not np.isfinite(loss[0]):
        message = "the loss of the first step was not seen, or is not finite"
        raise UnjudgedError(message)
    return float(loss[0])
