"""How a training went, unwatched: whether it learned, and whether it fails as it should.

A training has learned when half of its first loss is gone, and has failed when three quarters of
it are left or the loss is no longer a number. Where the loss does not say it, the case has a
criterion of its own here, with the reason.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.zoo.case import Faulty, Healthy


@dataclass(frozen=True, slots=True)
class Outcome:
    """The first loss, the median of the last twenty, and what else the program logged last.

    The first loss is the median of the first five where that is less: one batch is noisy.
    """

    start: float
    end: float
    scalars: dict[str, float]
    seconds: float

    @property
    def left(self) -> float:
        """The share of the first loss that is left; infinite for a loss that broke."""
        kept = self.end / self.start if self.start else math.inf
        return kept if math.isfinite(kept) else math.inf


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


class Listener:
    """A `watch` that keeps the losses and the scalars, and touches nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scalars: dict[str, list[float]] = defaultdict(list)
        self._handle: Any = None

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        criterion: nn.Module | None = None,
        *,
        scaler: object = None,
        loss_is_progress: bool = True,
    ) -> Self:
        del model, optimizer, scaler, loss_is_progress
        if criterion is not None:
            self._handle = criterion.register_forward_hook(self._computed)
        return self

    def _computed(self, criterion: nn.Module, args: object, loss: Tensor) -> None:
        del criterion, args
        if loss.requires_grad:
            self.losses.append(_number(loss))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def log(
        self,
        *,
        loss: Tensor | float | None = None,
        target: Tensor | None = None,
        output: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
        **scalars: Tensor | float,
    ) -> None:
        del target, output, grad_norm
        if loss is not None:
            self.losses.append(_number(loss))
        for name, value in scalars.items():
            self.scalars[name].append(_number(value))

    def outcome(self, seconds: float) -> Outcome:
        """What was heard; a loss that is not finite at the end has no end."""
        last = self.losses[-20:]
        end = statistics.median(last) if all(map(math.isfinite, last)) else math.nan
        scalars = {name: statistics.mean(values[-20:]) for name, values in self.scalars.items()}
        start = min(self.losses[0], statistics.median(self.losses[:5]))
        return Outcome(start, end, scalars, seconds)


def outcome(case: Faulty | Healthy, *, seed: int, repaired: bool = False) -> Outcome:
    """Train, and listen."""
    listener = Listener()
    torch.manual_seed(seed)
    began = time.process_time()
    if isinstance(case, Faulty):
        case.train(listener, repaired=repaired)
    else:
        case.train(listener)
    return listener.outcome(time.process_time() - began)


Criterion = Callable[[Outcome], bool]


def left(*, most: float = math.inf, least: float = 0.0) -> Criterion:
    """By the share of the first loss that is left."""
    return lambda outcome: least <= outcome.left <= most


def scalar(name: str, *, most: float = math.inf, least: float = -math.inf) -> Criterion:
    """By the mean of the last twenty values of what the program logs."""
    return lambda outcome: least <= outcome.scalars[name] <= most


LEARNED: dict[str, Criterion] = {}

FAILED: dict[str, Criterion] = {}


def learned(name: str, outcome: Outcome) -> bool:
    """Whether a healthy training, or the repaired twin of a faulty one, learned."""
    return LEARNED.get(name, left(most=0.5))(outcome)


def failed(name: str, outcome: Outcome) -> bool:
    """Whether a faulty training failed."""
    return FAILED.get(name, left(least=0.75))(outcome)
