"""A short training of a configuration, at several learning rates."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradscope.comparison.mitigation import Mitigation
from gradscope.comparison.result import EARLY_STEPS

# SGD with momentum, where an initialization shows: Adam takes steps of one size whatever the
# gradient. Four powers of ten, as the best rate moves with the initialization, and a ranking at
# one rate ranks the rates.
LEARNING_RATES = (1e-3, 1e-2, 1e-1, 1.0)
_MOMENTUM = 0.9
# The last tenth of the steps is averaged.
_LAST = 10


@dataclass(frozen=True, slots=True)
class Trained:
    """The best learning rate, and the mean loss of the last steps with it; inf: all diverged.

    early: the mean loss of the first steps, at the rate that is best for them.
    """

    loss: float
    learning_rate: float
    early: float


def trained(
    model: nn.Module,
    backward: Callable[[], float],
    steps: int,
    mitigation: Mitigation | None,
    *,
    rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
) -> Trained:
    """The best of some trainings from the model as it is, which it is afterwards again.

    backward: runs the model and its backward, and returns the loss.
    """
    start = copy.deepcopy(model.state_dict())
    best, best_rate, early = math.inf, math.nan, math.inf
    for rate in rates:
        model.load_state_dict(start)
        torch.manual_seed(seed)
        losses = _train(model, backward, steps, rate, mitigation)
        early = min(early, _mean(losses[:EARLY_STEPS]))
        loss = _mean(losses[-max(1, steps // _LAST) :])
        if loss < best:
            best, best_rate = loss, rate
    model.load_state_dict(start)
    return Trained(best, best_rate, early)


def _mean(losses: Sequence[float]) -> float:
    return math.inf if not all(map(math.isfinite, losses)) else sum(losses) / len(losses)


def _train(
    model: nn.Module,
    backward: Callable[[], float],
    steps: int,
    rate: float,
    mitigation: Mitigation | None,
) -> list[float]:
    """The losses, up to the first that isn't finite."""
    decay = mitigation.weight_decay if mitigation else 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=_MOMENTUM, weight_decay=decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(backward())
        if not math.isfinite(losses[-1]):
            break
        if mitigation and mitigation.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, mitigation.clip_norm)
        if mitigation and mitigation.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, mitigation.clip_value)
        optimizer.step()
    return losses
