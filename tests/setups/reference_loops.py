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
from tests.capture.reference import Numbers, assert_equal, described, prefixed, wide
from tests.capture.trainings import vectors
from tests.setups.twins import is_within_autograd_grad

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
        # Whether an optimizer has used the gradients of the step.
        self.has_begun = False
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
        self.has_begun = True
        return {
            name: (wide(parameter), wide(parameter.grad))
            for name, parameter in self.model.named_parameters()
            if id(parameter) in held and parameter.grad is not None
        }

    def step_ends(self) -> None:
        """All that one training step consists of is done."""
        unread: Mapping[str, Numbers] = {name: {} for name, _ in self.model.named_parameters()}
        self.steps.append({**unread, **self._step})
        self._step, self.has_begun = {}, False


def assert_received(table: Table, received: Received) -> None:
    """Every recorded step holds what the optimizers of that step were given, and no more."""
    assert any(numbers for step in received.steps for numbers in step.values())
    assert_equal(table, received.steps, quantities=QUANTITIES)


class Passed:
    """What the leaf modules return in training, and the gradients arriving there.

    Those of a step are what was computed until its first optimizer used the gradients.
    """

    def __init__(self, model: nn.Module, received: Received) -> None:
        self._received = received
        self._outputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, list[Tensor]] = {}
        self.steps: list[dict[str, Numbers]] = []
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(functools.partial(self._see, name))

    def _see(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        if torch.is_grad_enabled() and not self._received.has_begun:
            self._outputs.setdefault(name, []).append(output.detach().clone())
            arrived = self._gradients.setdefault(name, [])
            if output.requires_grad:
                output.register_hook(functools.partial(self._arrive, arrived))

    def _arrive(self, arrived: list[Tensor], gradient: Tensor) -> None:
        # Of the gradient of a gradient the loss's share comes in the loss's backward.
        if not (torch.is_grad_enabled() and is_within_autograd_grad()):
            arrived.append(gradient.detach().clone())

    def step_ends(self) -> None:
        numbers: dict[str, Numbers] = {}
        for name, outputs in self._outputs.items():
            numbers[name] = prefixed("output_", described(outputs))
            if gradients := self._gradients[name]:
                numbers[name] |= prefixed("output_grad_", described(gradients))
        self.steps.append(numbers)
        self._outputs, self._gradients = {}, {}


def assert_passed(table: Table, passed: Passed) -> None:
    """Every recorded step holds what modules returned in it, and what arrived there."""
    assert any(numbers for step in passed.steps for numbers in step.values())
    quantities = ("output_mean", "output_std", "output_rms", "output_absmax", "output_grad_norm")
    assert_equal(table, passed.steps, quantities=quantities)


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


@dataclass
class Followed:
    """A recorded loop, and what its optimizers and modules were given."""

    run: Run
    received: Received
    passed: Passed


def followed(build: Callable[[], Loop], folder: Path, *, given: bool = True) -> Followed:
    """The loop, every step recorded."""
    torch.manual_seed(0)
    loop = build()
    received = Received(loop.model, loop.optimizers)
    passed = Passed(loop.model, received)
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
            passed.step_ends()
        return Followed(scope.run(), received, passed)
