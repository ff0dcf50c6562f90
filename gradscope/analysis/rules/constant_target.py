"""GS606 constant-target."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import LIKELIHOODS, loss_graph
from gradscope.analysis.optimizers import take_turns
from gradscope.analysis.robust import measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import signal
from gradscope.analysis.words import count, number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a target counts as constant."""

    # Of two equally frequent classes 8 samples of 5 batches are all alike in one of 2³⁹ cases.
    fewest_samples: int = 8
    fewest_steps: int = 5


_CLASSIFIERS = frozenset({"CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"})


@rule("GS606", name="constant-target", requires=("signals.distinct",), limits=Limits())
def constant_target(run: Run, limits: Limits) -> Iterator[Finding]:
    """Every sample has the same target.

    ## What it measures
    The number of distinct values among the targets of each recorded batch: a single one in every
    batch, and the same in all.

    ## Why it matters
    The loss falls, to zero, while the model learns nothing but that constant from its output
    bias. A labels' column that was read wrongly, a comparison that is never true, an index that
    does not move look like this; no gradient tells.

    ## How sure it is
    Certain that the recorded targets were all the same; likely that the others were, too.

    ## Known limits
    Not judged: targets of zero in a regression (the residual of an equation), trainings of
    several optimizers (a GAN's labels for real and fake), and losses that are no measure of
    progress. Data that come sorted by class look like this until the class changes.

    ## Example
    `target = (label == "yes").long()` on labels that were read as numbers. Do instead: look at
    `target.unique(return_counts=True)` of a few batches.

    ## References
    Karpathy 2019, "A Recipe for Training Neural Networks", step 1; Humbatova et al. 2020 (ICSE),
    on faults in training data.
    """
    target = signal(run, "target")
    if target is None:
        message = "the target was not seen: watch(criterion=...), or scope.log(target=...)"
        raise UnjudgedError(message)
    if not run.meta.get("loss_is_progress", True) or take_turns(run):
        return
    known = measured(target["distinct"])
    samples = target.entity.shape[0] if target.entity.shape else 1
    if known.sum() < limits.fewest_steps or samples < limits.fewest_samples:
        message = (
            f"{count(int(known.sum()), 'recorded target')} of {count(samples, 'sample')} tell no "
            f"constant: {limits.fewest_steps} of {limits.fewest_samples} are needed"
        )
        raise UnjudgedError(message)
    values = target["mean"][known]
    if (target["distinct"][known] != 1).any() or (values != values[0]).any():
        return
    value = float(values[0])
    classes = _is_classification(run)
    if not classes and value == 0:
        return
    step, last = target.span("distinct")
    kind = "class" if classes else "value"
    yield constant_target.finding(
        Severity.ERROR if classes else Severity.WARNING,
        None,
        f"In {int(known.sum())} recorded batches every target is {kind} "
        f"{number(value)}: there is nothing to learn but a constant.",
        evidence=(Evidence("distinct", "target", step, last, 1.0, 2.0),),
        remedies=(
            "Look at the targets of a few batches: target.unique(return_counts=True); then at the "
            "line that makes them of the raw data.",
            "Shuffle the data (DataLoader(..., shuffle=True)) if they come sorted.",
        ),
    )


def _is_classification(run: Run) -> bool:
    if run.meta.get("criterion") in _CLASSIFIERS:
        return True
    try:
        graph = loss_graph(run)
    except UnjudgedError:
        return False
    return next(graph.find(*LIKELIHOODS), None) is not None
