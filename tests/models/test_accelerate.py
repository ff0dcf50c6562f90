"""accelerate's own loop: its wrapper around the optimizer is what one has at hand there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer

from gradscope.capture.scope import Scope, watch
from tests.capture.trainings import mlp_model, vectors
from tests.models.twins import assert_same_bits, bits
from tests.setups.reference_loops import Received, assert_received
from tests.setups.support import support

BATCHES = 6


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """It is the process's: another test may have begun with another."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


class Training:
    """A model and an optimizer that were prepared, accumulating over so many batches."""

    def __init__(self, accumulated: int) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        self.inner = SGD((model := mlp_model()).parameters(), lr=0.1, momentum=0.9)
        self.model: nn.Module = self.accelerator.prepare(model)
        self.optimizer: Optimizer = self.accelerator.prepare(self.inner)
        self.received = Received(self.model)

    def run(self, scope: Scope | None = None) -> None:
        """The loop of accelerate's documentation."""
        for number in range(BATCHES):
            torch.manual_seed(number)
            x, y = vectors()
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if scope is not None:
                scope.log(loss=loss)
            if self.accelerator.sync_gradients:
                self.received.step_ends()


@support("Models", "accelerate: the optimizer that `prepare` returns", parameters="right")
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("given", ["wrapped", "both", "inner"])
def test_a_prepared_optimizer(given: str, accumulated: int, tmp_path: Path) -> None:
    bare = Training(accumulated)
    bare.run()

    watched = Training(accumulated)
    watched.received.follow(watched.inner)
    named: dict[str, list[Optimizer]] = {
        "wrapped": [watched.optimizer],
        "both": [watched.optimizer, watched.inner],
        "inner": [watched.inner],
    }
    with watch(watched.model, named[given], log_dir=tmp_path, every=1) as scope:
        watched.run(scope)
        assert_same_bits(bits(watched.model), bits(bare.model))
        run = scope.run()
    assert run.meta["problems"] == []
    assert_received(run.parameters, watched.received)
    # What accumulates is one step, and the wrapper's other calls are none.
    assert len(run.recorded_steps) == BATCHES // accumulated
    assert run.meta["coverage"]["optimizer_steps"] == BATCHES // accumulated
    (settings,) = run.meta["coverage"]["optimizers"]
    assert (settings["type"], settings["lr"]) == ("SGD", 0.1)
    assert not np.isnan(run.scalars["learning_rate"]).any()
    assert not watched.inner._optimizer_step_pre_hooks


def test_a_single_one_as_it_is(tmp_path: Path) -> None:
    training = Training(1)
    with watch(training.model, training.optimizer, log_dir=tmp_path, every=1) as scope:
        training.run(scope)
        assert len(scope.run().recorded_steps) == BATCHES
