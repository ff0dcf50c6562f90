"""What each optimizer is given, and what it changes: read around its step, in float64."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradscope.capture.scope import watch
from gradscope.record import Run, Table
from tests.capture.reference import Numbers, assert_equal, wide
from tests.capture.trainings import vectors

F64 = NDArray[np.float64]

QUANTITIES = ("grad_norm", "grad_mean", "grad_absmax", "update_norm")


class Received:
    """Stands between the loop and `optimizer.step`; of a step that raises, nothing counts.

    What an optimizer is given is what `.grad` holds when its step begins or, with a closure,
    when that returns for the first time.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        self.model = model
        self._step: dict[str, Numbers] = {}
        self.steps: list[dict[str, Numbers]] = []
        for optimizer in optimizers:
            self.follow(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """From now on."""
        original: Callable[..., Any] = optimizer.step

        # A scheduler looks for a mark of its own on the method.
        @functools.wraps(original)
        def step(closure: Callable[[], Any] | None = None) -> Any:
            before: dict[str, tuple[F64, F64]] = {}

            def watched() -> Any:
                assert closure is not None
                result = closure()
                before.update({} if before else self._given(optimizer))
                return result

            if closure is None:
                before.update(self._given(optimizer))
                result = original()
            else:
                result = original(watched)
            after = dict(self.model.named_parameters())
            for name, (weight, gradient) in before.items():
                self._step[name] = {
                    "grad_norm": float(np.sqrt((gradient**2).sum())),
                    "grad_rms": float(np.sqrt((gradient**2).mean())),
                    "grad_mean": float(gradient.mean()),
                    "grad_absmax": float(np.abs(gradient).max()),
                    "update_norm": float(np.sqrt(((wide(after[name]) - weight) ** 2).sum())),
                }
            return result

        vars(optimizer)["step"] = step

    def _given(self, optimizer: Optimizer) -> dict[str, tuple[F64, F64]]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {
            name: (wide(parameter), wide(parameter.grad))
            for name, parameter in self.model.named_parameters()
            if id(parameter) in held and parameter.grad is not None
        }

    def step_ends(self) -> None:
        """All that one training step consists of is done."""
        unread: Mapping[str, Numbers] = {name: {} for name, _ in self.model.named_parameters()}
        self.steps.append({**unread, **self._step})
        self._step = {}


def assert_received(table: Table, received: Received) -> None:
    """Every recorded step holds what the optimizers of that step were given, and no more."""
    assert any(numbers for step in received.steps for numbers in step.values())
    assert_equal(table, received.steps, quantities=QUANTITIES)


STEPS = 5


@dataclass
class Loop:
    """A model, its optimizers, and the body of its training loop."""

    model: nn.Module
    optimizers: list[Optimizer]
    body: Callable[[int], object]
    # Before a step: may change the model, and add to the optimizers.
    change: Callable[[int], object] = lambda _: None


def loss_of(model: nn.Module) -> Tensor:
    x, y = vectors()
    return F.cross_entropy(model(x), y)


def backward(model: nn.Module, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model).backward()


def followed(
    build: Callable[[], Loop], folder: Path, *, given: bool = True
) -> tuple[Run, Received]:
    """The run of a loop, every step recorded, and what its optimizers received."""
    torch.manual_seed(0)
    loop = build()
    received = Received(loop.model, loop.optimizers)
    optimizers = list(loop.optimizers) if given else None
    with watch(loop.model, optimizers, log_dir=folder, every=1) as scope:
        for number in range(STEPS):
            known = list(loop.optimizers)
            loop.change(number)
            for optimizer in loop.optimizers:
                if optimizer not in known:
                    received.follow(optimizer)
            loop.body(number)
            scope.log(loss=float(number))
            received.step_ends()
        return scope.run(), received
