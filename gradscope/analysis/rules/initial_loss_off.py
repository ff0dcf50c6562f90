"""GS603 initial-loss-off."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.chance import Chance, chance, first_loss
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.rule import rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When the first loss is not what a net that knows nothing should have."""

    # PyTorch's and He's initializations start within 10 % of ln C on standardized inputs; a
    # linear probe on raw pixels from 0 to 16 at four times it, and learns: hence information.
    factor: float = 3.0
    # A sum over as few terms is hardly larger than their mean.
    fewest_terms: int = 8
    # A loss function may leave the sum to a further operation; of the terms some are ignored
    # (padding), and single ones cost more than guessing.
    sum_within: float = 2.0
    # Fewer steps are a beginning (analysis/harm.py).
    fewest_steps: int = 20


@rule("GS603", name="initial-loss-off", limits=Limits())
def initial_loss_off(run: Run, limits: Limits) -> Iterator[Finding]:
    """The first loss is far above that of a guess.

    ## What it measures
    The loss of step 0 over ln C, which a classifier of C classes costs that gives each the same
    probability (ln 2 for a binary one, the logarithm of the vocabulary for a language model). C
    and the number of terms in the batch are read from the loss's autograd graph.

    ## Why it matters
    A first loss of ln C times the number of terms is a sum: the gradient, and with it every step
    of SGD, is as many times larger, and changes with the batch size. Otherwise the net starts
    confident and wrong: inputs or weights are too large, and the first steps only undo that.

    ## How sure it is
    Certain that the loss began far from a guess's. That this is what does harm is possible.

    ## Known limits
    Without harm it is information: Adam does not care for the loss's scale, a learning rate may be
    meant for a sum, and too much confidence wears off. Losses of several terms and of regressions
    have no such number, and class weights on a binary loss change it.

    ## Example
    `nn.CrossEntropyLoss(reduction="sum")` on batches of 64 with SGD at 0.1: the loss starts at
    64·ln 10 = 147, and the first steps kill the net. Do instead: `reduction="mean"`.

    ## References
    Karpathy 2019, "A Recipe for Training Neural Networks" (verify loss at init); Schoop et al.
    2021 (UMLAUT, CHI); Nikanjam et al. 2021 (TheDeepChecker, TOSEM), on wrong loss functions.
    """
    guess = chance(run)
    start = first_loss(run)
    ratio = start / guess.loss
    if ratio < limits.factor:
        return
    loss = progress(run)
    summed = _is_sum(guess, ratio, limits)
    if not summed and not guess.alone:
        return
    if summed:
        message = (
            f"The first loss is {number(start)}, {number(ratio)} times ln {guess.classes:,} = "
            f"{number(guess.loss)}: it adds up {guess.terms:,} terms instead of averaging them, "
            f"and the gradient is as many times larger; {loss.words}."
        )
        remedies = (
            "Average over the batch: reduction='mean' in the loss, .mean() instead of .sum().",
            f"Or keep the sum, and divide the learning rate by {guess.terms:,}.",
        )
    else:
        message = (
            f"The first loss is {number(start)}, {number(ratio)} times ln {guess.classes:,} = "
            f"{number(guess.loss)}, which guessing costs: the net starts confident and wrong; "
            f"{loss.words}."
        )
        remedies = (
            "Scale the inputs to mean 0 and standard deviation 1.",
            "Initialize the output layer small, nn.init.normal_(weight, std=0.01), and its bias "
            "at zero.",
        )
    yield initial_loss_off.finding(
        _severity(loss, guess, long=len(run.steps) >= limits.fewest_steps, summed=summed),
        None,
        message,
        evidence=(Evidence("loss / ln C", None, 0, 0, ratio, limits.factor),),
        remedies=remedies,
    )


def _is_sum(guess: Chance, ratio: float, limits: Limits) -> bool:
    if guess.terms < limits.fewest_terms:
        return False
    near = guess.terms / limits.sum_within <= ratio <= guess.terms * limits.sum_within
    return guess.summed or near


def _severity(loss: Progress, guess: Chance, *, long: bool, summed: bool) -> Severity:
    if loss.failed:
        return Severity.ERROR if summed else Severity.WARNING
    # Its fall was that of a sum that began too high: a guess is still better. Too much confidence
    # has a cause of its own, that does the harm.
    seen = loss.verdict in {LossVerdict.LEARNING, LossVerdict.CONVERGED, LossVerdict.UNKNOWN}
    worse = loss.end > guess.loss * guess.terms
    return Severity.WARNING if summed and seen and worse and long else Severity.INFO
