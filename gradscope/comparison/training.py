"""A short training of a configuration, at several learning rates."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradscope.comparison.mitigation import Mitigation

# SGD with momentum, where an initialization shows: Adam takes steps of one size whatever the
# gradient. Four powers of ten, as the best rate moves with the initialization, and a ranking at
# one rate ranks the rates.
LEARNING_RATES = (1e-3, 1e-2, 1e-1, 1.0)
_MOMENTUM = 0.9
# The last tenth of the steps is averaged.
_LAST = 10


@dataclass(frozen=True, slots=True)
class Trained:
    """The best learning rate, and the mean loss of the last steps with it; inf: all diverged."""

    loss: float
    learning_rate: float


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
    best = Trained(math.inf, math.nan)
    for rate in rates:
        model.load_state_dict(start)
        torch.manual_seed(seed)
        loss = _train(model, backward, steps, rate, mitigation)
        if loss < best.loss:
            best = Trained(loss, rate)
    model.load_state_dict(start)
    return best


def _train(
    model: nn.Module,
    backward: Callable[[], float],
    steps: int,
    rate: float,
    mitigation: Mitigation | None,
) -> float:
    decay = mitigation.weight_decay if mitigation else 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=_MOMENTUM, weight_decay=decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(backward())
        if not math.isfinite(losses[-1]):
            return math.inf
        if mitigation and mitigation.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, mitigation.clip_norm)
        if mitigation and mitigation.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, mitigation.clip_value)
        optimizer.step()
    last = losses[-max(1, steps // _LAST) :]
    return sum(last) / len(last)
