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


def ends(*, most: float = math.inf, least: float = 0.0) -> Criterion:
    """By the last losses themselves; one that is not finite is large."""
    return lambda outcome: (
        least <= (outcome.end if math.isfinite(outcome.end) else math.inf) <= most
    )


def both(first: Criterion, second: Criterion) -> Criterion:
    """Where one says too little."""
    return lambda outcome: first(outcome) and second(outcome)


LEARNED: dict[str, Criterion] = {
    # The loss has a floor: three labels in ten are drawn, the noise can't all be told.
    "wrong_labels": left(most=0.65),
    "diffused_moons": left(most=0.65),
    # Below nine tenths of what the frequencies of the bytes say, 3.25 nats.
    "gpt2_on_text": ends(most=2.92),
    "gpt2_at_three_tenths": ends(most=2.92),
    "llama_on_text": ends(most=2.92),
    "mixtral_on_text": ends(most=2.92),
    "t5_on_text": ends(most=2.92),
    "lstm_on_text": ends(most=2.92),
    # Attention learns slowly where to look.
    "vit_on_digits": left(most=0.6),
    "swin_on_digits": left(most=0.6),
    "vit_with_softmax": left(most=0.6),
    # Stopped before its faulty twin has grown out of it.
    "bottleneck_of_a_thousandth": left(most=0.6),
    # Losses that say nothing.
    "adversaries": both(scalar("deviation", least=0.75), scalar("centre", most=0.6)),
    "stopped_gradient": both(scalar("spread", least=0.7), ends(most=-0.6, least=-1.0)),
    "siamese": both(scalar("spread", least=0.7), ends(most=-0.6, least=-1.0)),
    "predicted_features": scalar("deviation", least=0.5),
    "variational": scalar("code", least=0.3),
    "variational_digits": scalar("code", least=0.3),
    "rewarded": scalar("reward", least=0.9),
    "moving_goal": scalar("right", least=0.95),
    # One sample says nothing either.
    "one_sample_at_a_time": scalar("unexplained", most=0.4),
}

FAILED: dict[str, Criterion] = {
    # At chance, ln 10, from an initial loss of hundreds.
    "convolutions_ten_times_too_large": ends(least=2.0),
    # From the mean square of the targets down to their variance: outputs are one constant.
    "parabola": left(least=0.3),
    # Nothing beyond the frequencies of the bytes.
    "gpt2_at_three_tenths": ends(least=3.1),
    # Worse than repaired, but learning.
    # The head learns from random features.
    "tanh_at_its_ends": ends(least=0.3),
    # All units are one, which parts a circle only by a line.
    "equal_hidden_weights": ends(least=0.45),
    "softmax_over_the_batch": ends(least=1.0),
    # The floor of a sigmoid within a sigmoid: (ln(1 + 1/e) + ln 2) / 2 of ln 2.
    "sigmoid_before_logits_loss": ends(least=0.49),
    # Scores in (0, 1) of ten classes: ln(1 + 9/e) at best.
    "sigmoid_before_cross_entropy": ends(least=1.4),
    # Minus a probability: −1 at best.
    "probabilities_for_nll": ends(least=-0.5, most=0.0),
    # Far above what they reach on scaled data.
    "prices": left(least=0.4),
    "raw_wine": ends(least=0.2),
    "features_of_ten_thousand": ends(least=0.15),
    "one_feature_in_millions": ends(least=0.9),
    # What is seen is learned; the accuracy is of all the data, in evaluation.
    "the_same_batch": scalar("accuracy", most=0.75),
    "a_generator_seeded_anew": scalar("accuracy", most=0.75),
    "labels_all_zero": scalar("accuracy", most=0.2),
    "a_constant_target": scalar("unexplained", least=1.0),
    "statistics_that_never_move": scalar("accuracy", most=0.5),
    "statistics_of_convolutions": scalar("accuracy", most=0.7),
    "evaluation_mode_after_validation": ends(least=0.5),
    "bottleneck_not_in_optimizer": ends(least=0.15),
    "never_cleared": left(least=0.45),
    "never_cleared_with_adam": left(least=0.4),
    "siamese": scalar("spread", most=0.1),
    "variational": scalar("code", most=0.05),
    "predicted_features": scalar("deviation", most=0.05),
}


def learned(name: str, outcome: Outcome) -> bool:
    """Whether a healthy training, or the repaired twin of a faulty one, learned."""
    return LEARNED.get(name, left(most=0.5))(outcome)


def failed(name: str, outcome: Outcome) -> bool:
    """Whether a faulty training failed."""
    return FAILED.get(name, left(least=0.75))(outcome)
