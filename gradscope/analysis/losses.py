"""The loss as a curve, and what its course can be a witness of."""

from dataclasses import dataclass

import numpy as np

from gradscope.analysis.chance import of_a_guess
from gradscope.analysis.finding import Severity
from gradscope.analysis.layers import ROOT
from gradscope.analysis.optimizers import take_turns
from gradscope.analysis.robust import F64, at_last, noise
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.words import count
from gradscope.record import Run, StepArray

# A loss with this share of its values on either side of zero is no distance from a goal: the
# surrogate of a policy gradient, a critic's score.
_MIXED_SIGNS = 0.05
# Of a model that guesses the losses are near that of a constant; half of it is not near.
_LEARNED = 0.5
_FIRST = 5
# As in harm.py: what stands out of the noise.
_CLEAR = 5.0
# What still leads nowhere after so many steps will hardly begin to.
_LONG = 100


@dataclass(frozen=True, eq=False, slots=True)
class Losses:
    """The finite losses, in the order of their steps."""

    steps: StepArray
    values: F64

    @property
    def smooth(self) -> F64:
        """Moving medians: a single bad batch is no level. The window grows with the run."""
        width = min(max(5, self.values.size // 20), 50)
        windows = np.lib.stride_tricks.sliding_window_view(self.values, width)
        medians: F64 = np.median(windows, axis=1)
        return medians

    @property
    def start(self) -> float:
        """The level at first: the median of a tenth, or the first loss if it is clearly lower.

        A training may blow up within its first steps; but the first of noisy losses may be low by
        chance.
        """
        level = float(np.median(self.values[: max(5, self.values.size // 10)]))
        first = float(self.values[0])
        later = self.values[self.values.size // 2 :]
        return first if first < level - _CLEAR * noise(later) else level

    @property
    def is_flat(self) -> bool:
        """Whether a long run ends where it began, for all that its noise shows.

        The means of its halves: where the loss is noisy they show a smaller fall than the
        medians of its ends do.
        """
        if self.values.size < _LONG:
            return False
        first, second = np.array_split(self.values, 2)
        error = np.hypot(first.std(), second.std()) / np.sqrt(second.size)
        return bool(first.mean() - second.mean() < 2 * error)


def losses(run: Run, fewest: int) -> Losses:
    """The losses. Raises UnjudgedError where there are too few, or they measure no progress."""
    if not run.meta.get("loss_is_progress", True):
        message = "the loss was said to be no measure of progress"
        raise UnjudgedError(message)
    loss = run.scalars["loss"].astype(np.float64)
    known = np.isfinite(loss)
    values = loss[known]
    if values.size < fewest:
        message = f"a finite loss was seen in {count(values.size, 'step')}, {fewest} are needed"
        raise UnjudgedError(message)
    if min((values > 0).mean(), (values < 0).mean()) >= _MIXED_SIGNS:
        message = "the loss takes both signs: how far it is from its goal is not known"
        raise UnjudgedError(message)
    return Losses(run.steps[known], values)


def at_most(run: Run, level: Severity) -> Severity:
    """The severity that the loss alone can prove.

    Of several optimizers each may have a loss of its own, against the others': as in a GAN,
    where that of the one that is losing rises.
    """
    return Severity.INFO if take_turns(run) else level


def is_learned_already(run: Run) -> bool:
    """Whether the first losses are far below those of a guess, as of a model that was trained.

    Known where the loss itself is the mean of a cross-entropy, or a squared error.
    """
    loss = run.scalars["loss"].astype(np.float64)
    known = loss[np.isfinite(loss)]
    return bool(known.size and np.median(known[:_FIRST]) < _LEARNED * of_a_guess(run))


def asks_for_nothing(run: Run) -> bool:
    """Whether the gradient of the model's output was exactly zero at last: a hinge that is met."""
    modules = run.modules
    if ROOT not in modules.names:
        return False
    root = [modules.names.index(ROOT)]
    return bool(at_last(modules["output_grad_norm"][:, root])[0, 0] == 0)
