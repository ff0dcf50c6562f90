"""GS203 loss-not-decreasing."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.analysis.losses import asks_for_nothing, at_most, is_learned_already, losses
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a loss counts as not decreasing. What stuck means is in `analysis/harm.py`."""

    # Five times as many as a trend needs: this is said where nothing else is, and a slow start
    # is not a failure.
    min_losses: int = 100
    # What ends below this share of the start has fallen, even if not below the first loss, which
    # may be low by chance. Less can be what the first few steps gain (harm.py, 5 %).
    fall: float = 0.95


@rule("GS203", name="loss-not-decreasing", limits=Limits())
def loss_not_decreasing(run: Run, limits: Limits) -> Iterator[Finding]:
    """The loss gets nowhere; why is not known.

    ## What it measures
    Whether the median of the last fifth of the losses is below that of the first tenth, by 1 %
    or by what stands out of the noise; and, in a run of 100 steps, by more than the first few
    steps gain by learning how frequent each class is.

    ## Why it matters
    The model does not learn. If another finding is there, that is why, and this one is nested
    under it. If it stands alone, gradients, updates and activations look sound: then what the
    model is asked to learn is not in its inputs.

    ## How sure it is
    Certain that the loss did not fall by more than its noise. The cause is unknown if no other
    finding explains it: a hard task, a wrong label and a wrong rate look alike.

    ## Known limits
    It can't tell labels that were shuffled against their inputs from a task that is too hard.
    Not judged: what was said to be no measure of progress, losses of both signs, a training that
    goes on where the model is good already (below half of what a guess costs, where that is
    known), a loss that sends no gradient back, as a hinge that is met. Of several optimizers,
    which may work against each other, it is information.

    ## Example
    `x = x[torch.randperm(len(x))]` without the same for `y`: the loss rests at ln C. Do instead:
    one permutation for both.

    ## References
    Zhang et al. 2021 (AUTOTRAINER, ICSE), slow convergence; Karpathy 2019, "A recipe for training
    neural networks": overfit one batch.
    """
    curve = losses(run, limits.min_losses)
    loss = progress(run)
    if loss.verdict is LossVerdict.UNKNOWN:
        message = "whether the loss falls is hidden by its noise, or the learning rate still rises"
        raise UnjudgedError(message)
    fell = loss.end < limits.fall * curve.start
    if loss.verdict is not LossVerdict.STUCK or fell:
        return
    if is_learned_already(run) or asks_for_nothing(run):
        return
    # What it rests on is the level at last: a fault that showed any time before may be the cause.
    tail = max(5, curve.values.size // 5)
    begin, last = int(curve.steps[-tail]), int(curve.steps[-1])
    yield loss_not_decreasing.finding(
        at_most(run, Severity.WARNING),
        None,
        f"The loss was {number(curve.start)} at first and is {number(loss.end)} after "
        f"{len(curve.values)} steps: the model is not learning.",
        evidence=(
            Evidence("loss (median of the last fifth)", None, begin, last, loss.end, curve.start),
        ),
        remedies=(
            "Look at a batch: inputs and targets must belong together; one shuffled without the "
            "other can't be learned.",
            "Overfit a single batch: if its loss does not fall to almost zero, the fault is in the "
            "model or the loss; if it does, in the data.",
            "Try learning rates ten times larger and smaller.",
        ),
    )
