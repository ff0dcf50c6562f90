"""GS602 unscaled-target."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.graph import BINARY, LIKELIHOODS, REGRESSIONS, loss_graph
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.robust import measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import signal
from gradscope.analysis.updates import updates
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When the targets of a regression are at another scale than the outputs."""

    # Standardized targets lie within a decade of what a net puts out at first; two decades are
    # what features may differ by (GS601), and what the output must grow by.
    ratio: float = 100.0
    # A net on standardized inputs puts out 0.1 to 1 at first (He et al. 2015); a last layer
    # that starts at zero is no measure of it.
    least_output: float = 0.1
    # Fewer steps are a beginning (analysis/harm.py).
    fewest_steps: int = 20
    # A tenth of a weight in one step, DeepDiagnosis' and TheDeepChecker's upper bound.
    large_update: float = 0.1


_REGRESSORS = frozenset({"MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "GaussianNLLLoss"})


@rule("GS602", name="unscaled-target", requires=("signals.rms",), limits=Limits())
def unscaled_target(run: Run, limits: Limits) -> Iterator[Finding]:
    """The targets of a regression are far larger than what the model puts out.

    ## What it measures
    The root mean square of the targets over that of the model's output at the first recorded
    step, in a regression; and whether the loss is stuck or broken, or the outputs end farther
    from the targets' mean than the targets' standard deviation.

    ## Why it matters
    The gradient of a squared error is in proportion to the error. With SGD the first steps are as
    many times too large, and the loss blows up; Adam moves each weight by its learning rate, and
    the output has so far to go that the loss hardly moves.

    ## How sure it is
    Certain as to the scale. That it does harm is likely: it is said only where the loss has
    suffered.

    ## Known limits
    Without harm it is not reported: a small learning rate and patience arrive, too. Needs the
    target: `criterion=` or `scope.log(target=...)`.

    ## Example
    House prices of 200,000 as the targets of `nn.MSELoss`. Do instead:
    `target = (price - mean) / std`, and undo it on the outputs.

    ## References
    LeCun et al. 1998, "Efficient BackProp", section 4; Zhang et al. 2021 (AUTOTRAINER, ICSE) and
    Cao et al. 2022 (DeepDiagnosis, ICSE), on data that were not normalized.
    """
    target, output = signal(run, "target"), signal(run, "output")
    if target is None or output is None:
        message = "the target was not seen: watch(criterion=...), or scope.log(target=...)"
        raise UnjudgedError(message)
    scale, first = target.typical("rms"), output.first("rms")
    if not _is_regression(run) or math.isnan(scale) or math.isnan(first):
        return
    ratio = scale / max(first, limits.least_output)
    loss = progress(run)
    mean, sigma = target.typical("mean"), target.typical("std")
    # The mean of all targets, which takes no input to know, would be a better output.
    away = abs(output.last("mean") - mean)
    on_the_way = loss.verdict in {LossVerdict.LEARNING, LossVerdict.UNKNOWN}
    far = on_the_way and away > sigma and len(run.steps) >= limits.fewest_steps
    if ratio < limits.ratio or not (loss.failed or far):
        return
    step, last = target.span("rms")
    moved = _largest_update(run)
    steps = (
        f"steps of up to {number(moved)} times a weight follow"
        if moved >= limits.large_update
        else "the steps are too small for the way"
    )
    still = "" if loss.failed else f", the outputs end {number(away)} from their mean"
    yield unscaled_target.finding(
        Severity.ERROR if loss.failed else Severity.WARNING,
        None,
        f"The targets (rms {number(scale)}) are {number(ratio)} times as large as the output at "
        f"first ({number(first)}), {steps}{still}, and {loss.words}.",
        evidence=(
            Evidence("rms of target / rms of output", "target", step, last, ratio, limits.ratio),
        ),
        remedies=(
            f"Standardize the targets: (target - {number(mean)}) / {number(sigma)}, with numbers "
            "of the training set, and undo it on the outputs.",
            "Or start the output layer's bias at the targets' mean, and divide the learning rate "
            f"of SGD by {number(10.0 ** math.ceil(math.log10(ratio)))}.",
        ),
    )


def _is_regression(run: Run) -> bool:
    """Whether the loss compares numbers, as far as its criterion or its graph tells."""
    if run.meta.get("criterion") in _REGRESSORS:
        return True
    try:
        graph = loss_graph(run)
    except UnjudgedError:
        return False
    if next(graph.find(*LIKELIHOODS, *BINARY, "LogSoftmax", "Logsumexp"), None) is not None:
        return False
    differences = (graph.nodes[index] for index in graph.find(*REGRESSIONS, "Sub", "Rsub"))
    return any(-1 in node.inputs for node in differences)


def _largest_update(run: Run) -> float:
    try:
        largest = updates(run).largest
    except UnjudgedError:
        return math.nan
    return float(max(largest[measured(largest)], default=math.nan))
