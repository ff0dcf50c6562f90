"""Wherever a training is interrupted: the log is complete, the hooks are gone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from gradscope.capture.scope import watch
from gradscope.log.reader import load
from tests.capture.trainings import vectors
from tests.setups.reference_loops import Received, assert_received
from tests.setups.support import support

# Of five steps, so many are whole.
WHOLE = 3


class Interruption:
    """Raises once, at a chosen place of a chosen step."""

    def __init__(self, place: str, error: type[BaseException]) -> None:
        self.place, self.error = place, error
        self.step = 0

    def __call__(self, place: str) -> None:
        if place == self.place and self.step == WHOLE:
            self.step += 1
            raise self.error


class Net(nn.Module):
    def __init__(self, at: Callable[[str], None]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.at("forward")
        if x.requires_grad:
            x.register_hook(lambda _: self.at("backward"))
        out: Tensor = self.last(x)
        return out


class Sgd(SGD):
    """Interrupted before it changes anything."""

    at: Callable[[str], None]

    def step(self, closure: Any = None) -> Any:
        self.at("optimizer")
        return super().step(closure)


def hooks_of(model: nn.Module, optimizer: SGD) -> int:
    holders = [*model.modules(), optimizer, torch_optimizer, nn.modules.module]
    return sum(
        len(value)
        for holder in holders
        for name, value in vars(holder).items()
        if "hook" in name and isinstance(value, dict)
    )


class Training:
    def __init__(self, place: str, error: type[BaseException], *, closure: bool) -> None:
        torch.manual_seed(0)
        self.interruption = Interruption(place, error)
        self.model = Net(self.interruption)
        self.optimizer = Sgd(self.model.parameters(), lr=0.1)
        self.optimizer.at = self.interruption
        self._in_closure = closure
        self.untouched = hooks_of(self.model, self.optimizer)
        self.received = Received(self.model, [self.optimizer])

    def _backward(self) -> float:
        self.optimizer.zero_grad()
        x, y = vectors()
        loss = F.cross_entropy(self.model(x), y)
        self.interruption("between")
        loss.backward()
        self.interruption("before the step")
        return float(loss.detach())

    def step(self) -> None:
        if self._in_closure:
            self.optimizer.step(self._backward)
        else:
            self._backward()
            self.optimizer.step()
        self.received.step_ends()
        self.interruption.step += 1
        self.interruption("after the step")


PLACES = ["forward", "between", "backward", "before the step", "optimizer", "after the step"]


@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("place", PLACES)
def test_log_is_complete_and_hooks_are_gone(
    place: str, given: bool, closure: bool, tmp_path: Path
) -> None:
    training = Training(place, KeyboardInterrupt, closure=closure)

    def train() -> None:
        optimizer = training.optimizer if given else None
        with watch(training.model, optimizer, log_dir=tmp_path, every=1) as scope:
            for number in range(5):
                training.step()
                scope.log(loss=float(number))

    with pytest.raises(KeyboardInterrupt):
        train()
    assert hooks_of(training.model, training.optimizer) == training.untouched
    run = load(tmp_path)
    assert list(run.steps) == list(range(WHOLE))
    assert_received(run.parameters, training.received)
    assert run.meta["left_out"] == []
    assert "KeyboardInterrupt" in str(run.meta["problems"])


@support("Loops", "exceptions and KeyboardInterrupt anywhere in a step", parameters="right")
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("place", PLACES[:-1])
def test_training_that_goes_on_is_recorded_rightly(
    place: str, closure: bool, tmp_path: Path
) -> None:
    """Out of memory at one batch, say, and the loop takes the next."""
    training = Training(place, MemoryError, closure=closure)
    caught = 0
    with watch(training.model, training.optimizer, log_dir=tmp_path, every=1) as scope:
        while len(training.received.steps) < 5:
            try:
                training.step()
            except MemoryError:
                caught += 1
            else:
                scope.log(loss=1.0)
        run = scope.run()
    assert caught == 1
    assert list(run.steps) == list(range(5))
    assert_received(run.parameters, training.received)
    assert run.meta["problems"] == []
