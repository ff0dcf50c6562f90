"""Models and optimizers that change while they train, or take turns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from gradscope.capture.scope import watch
from gradscope.errors import GradscopeWarning
from tests.capture.trainings import mlp_model, sgd, vectors
from tests.setups.reference_loops import (
    STEPS,
    Loop,
    Received,
    assert_passed,
    assert_received,
    backward,
    followed,
    loss_of,
)
from tests.setups.support import support


def body_and_head(model: nn.Sequential) -> tuple[Optimizer, Optimizer]:
    body = SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    return body, Adam(model[4].parameters(), lr=0.01)


def step_all(loop: Loop) -> Callable[[int], None]:
    def body(number: int) -> None:
        del number
        loop.model.zero_grad()
        loss_of(loop.model).backward()
        for optimizer in loop.optimizers:
            optimizer.step()

    return body


# What comes later.


def built_after_watch() -> Loop:
    loop = Loop(mlp_model(), [], lambda _: None)
    loop.body = step_all(loop)
    loop.change = lambda number: loop.optimizers.append(sgd(loop.model)) if number == 0 else None
    return loop


@support(
    "Optimizers",
    "built after `watch`",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
def test_optimizer_built_after_watch(tmp_path: Path) -> None:
    loop = followed(built_after_watch, tmp_path, given=False)
    run = loop.run
    assert list(run.steps) == list(range(STEPS))
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)


def group_added() -> Loop:
    """The body rests until it gets a group of its own, with its own learning rate."""
    model = mlp_model()
    loop = Loop(model, [AdamW(model[4].parameters(), lr=0.01)], lambda _: None)
    loop.body = step_all(loop)

    def change(number: int) -> None:
        if number == 2:
            group = {"params": [*model[0].parameters(), *model[2].parameters()], "lr": 0.001}
            loop.optimizers[0].add_param_group(group)

    loop.change = change
    return loop


@support(
    "Optimizers",
    "a parameter group added in mid-training",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_group_added_in_mid_training(given: bool, tmp_path: Path) -> None:
    loop = followed(group_added, tmp_path, given=given)
    run = loop.run
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)
    added = run.parameters.names.index("0.weight")
    assert list(run.parameters["in_optimizer"][:, added]) == [0, 0, 1, 1, 1]
    assert (run.parameters["grad_missing"][:, added] == 0).all()


def unfrozen() -> Loop:
    """The body is frozen at first, and frozen again at the end; its group is there all the time."""
    model = mlp_model()
    model[0].requires_grad_(False)
    loop = Loop(model, [sgd(model)], lambda _: None)
    loop.body = step_all(loop)

    def change(number: int) -> None:
        model[0].requires_grad_(2 <= number < 4)

    loop.change = change
    return loop


@support(
    "Optimizers",
    "a layer unfrozen in mid-training",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
def test_layer_unfrozen_in_mid_training(tmp_path: Path) -> None:
    loop = followed(unfrozen, tmp_path)
    run = loop.run
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)
    flags = run.parameters["requires_grad"][:, run.parameters.names.index("0.weight")]
    assert list(flags) == [0, 0, 1, 1, 0]


def head_replaced(*, when: int, outputs: int) -> Loop:
    """A new head, and an optimizer that holds it."""
    model = mlp_model()
    loop = Loop(model, [sgd(model)], lambda _: None)
    loop.body = step_all(loop)

    def change(number: int) -> None:
        if number == when:
            model[4] = nn.Linear(8, outputs)
            loop.optimizers[:] = [Adam(model.parameters(), lr=0.01)]

    loop.change = change
    return loop


@support("Optimizers", "a head replaced after `watch`", parameters="right")
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("outputs", [5, 7])
def test_head_replaced_after_watch(when: int, outputs: int, tmp_path: Path) -> None:
    loop = followed(lambda: head_replaced(when=when, outputs=outputs), tmp_path, given=False)
    run = loop.run
    assert_received(run.parameters, loop.received)
    assert run.modules.names.count("4") == 1
    assert not np.isnan(run.modules["output_grad_norm"]).any()


@support(
    "Optimizers",
    "one that was not given to `watch`, beside one that was",
    parameters="labelled",
    note="its steps are not recorded, which is said aloud",
)
def test_optimizer_that_was_not_given_is_said(tmp_path: Path) -> None:
    """The one that was given is thrown away with the old head."""
    with pytest.warns(GradscopeWarning, match="Adam") as warned:
        run = followed(lambda: head_replaced(when=2, outputs=5), tmp_path, given=True).run
    assert len(warned) == 1
    (said,) = [problem["message"] for problem in run.meta["problems"]]
    for words in ("Adam", "not given to watch()", "leave out optimizer"):
        assert words in said


# What takes turns.


def closures_in_turn() -> Loop:
    """Two optimizers, each with a closure that runs the model."""
    model = mlp_model()
    optimizers = body_and_head(model)

    def closure_of(optimizer: Optimizer) -> Callable[[], float]:
        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss.item()

        return closure

    def body(number: int) -> None:
        optimizer = optimizers[number % 2]
        optimizer.step(closure_of(optimizer))

    return Loop(model, list(optimizers), body)


@support(
    "Optimizers",
    "closures of several in turn: a step each",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_closures_in_turn_are_a_step_each(given: bool, tmp_path: Path) -> None:
    loop = followed(closures_in_turn, tmp_path, given=given)
    run = loop.run
    assert list(run.steps) == list(range(STEPS))
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)
    np.testing.assert_allclose(run.scalars["learning_rate"], [0.1, 0.01, 0.1, 0.01, 0.1])
    assert not np.isnan(run.modules["output_grad_norm"]).any()


def test_closures_in_turn_with_some_steps_unrecorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = closures_in_turn()
    received = Received(loop.model, loop.optimizers)
    with watch(loop.model, loop.optimizers, log_dir=tmp_path, every=3) as scope:
        for number in range(7):
            loop.body(number)
            received.step_ends()
        run = scope.run()
    assert list(run.recorded_steps) == [0, 3, 6]
    names = run.parameters.names
    for row, step in enumerate(run.recorded_steps):
        for name, numbers in received.steps[int(step)].items():
            found = run.parameters["grad_norm"][row, names.index(name)]
            np.testing.assert_allclose(found, numbers.get("grad_norm", np.nan), rtol=1e-4)


class Pair:
    """A generator, a discriminator, and a step of each on the same noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.generates = Adam(self.generator.parameters(), lr=0.01)
        self.discriminates = Adam(self.discriminator.parameters(), lr=0.01)

    def train_discriminator(self) -> Tensor:
        fake = self.generator(torch.randn(12, 3))
        self.discriminates.zero_grad()
        real = -F.logsigmoid(self.discriminator(vectors()[0])).mean()
        loss = real - F.logsigmoid(-self.discriminator(fake.detach())).mean()
        loss.backward()
        self.discriminates.step()
        return loss

    def train_generator(self) -> Tensor:
        self.generates.zero_grad()
        fake = self.generator(torch.randn(12, 3))
        loss: Tensor = -F.logsigmoid(self.discriminator(fake)).mean()
        loss.backward()
        self.generates.step()
        return loss


@support("Loops", "two models in turn (GAN), each watched", parameters="right")
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_two_models_that_train_in_turn(given: bool, tmp_path: Path) -> None:
    pair = Pair()
    sides = {
        "generator": (pair.generator, pair.generates),
        "discriminator": (pair.discriminator, pair.discriminates),
    }
    received = {name: Received(model, [optimizer]) for name, (model, optimizer) in sides.items()}
    scopes = {
        name: watch(
            model,
            optimizer if given else None,
            log_dir=tmp_path / name,
            every=1,
            loss_is_progress=False,
        )
        for name, (model, optimizer) in sides.items()
    }
    for number in range(STEPS):
        scopes["discriminator"].log(loss=pair.train_discriminator())
        # Two steps of one, now and then.
        for _ in range(1 + number % 2):
            scopes["generator"].log(loss=pair.train_generator())
            received["generator"].step_ends()
        received["discriminator"].step_ends()
    for name, scope in scopes.items():
        scope.close()
        run = scope.run()
        assert_received(run.parameters, received[name])
        assert run.meta["problems"] == []


@support("Loops", "two models in turn (GAN), one of them watched", parameters="right")
def test_one_model_of_two_that_train_in_turn(tmp_path: Path) -> None:
    """As in a LightningModule; its own forward is the generator's."""

    class Gan(nn.Module):
        def __init__(self, pair: Pair) -> None:
            super().__init__()
            self.generator, self.discriminator = pair.generator, pair.discriminator

        def forward(self, noise: Tensor) -> Tensor:
            out: Tensor = self.generator(noise)
            return out

    pair = Pair()
    model = Gan(pair)
    # The loop calls the model, not its part.
    pair.generator = model
    optimizers = [pair.generates, pair.discriminates]
    received = Received(model, optimizers)
    with watch(model, optimizers, log_dir=tmp_path, every=1) as scope:
        for _ in range(STEPS):
            pair.train_discriminator()
            received.step_ends()
            pair.train_generator()
            received.step_ends()
        run = scope.run()
    assert_received(run.parameters, received)


# Steps that fail.


@support("Loops", "a step that fails and is tried again", parameters="right")
def test_step_that_fails_and_is_tried_again(tmp_path: Path) -> None:
    """Out of memory in the optimizer, say: the gradients that count are those of the second try."""
    model = mlp_model()

    class Fragile(SGD):
        fails = False

        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            del closure
            if self.fails:
                self.fails = False
                raise MemoryError
            super().step()

    optimizer = Fragile(model.parameters(), lr=0.1)
    received = Received(model, [optimizer])
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(STEPS):
            optimizer.fails = number == 2
            backward(model, optimizer)
            if number == 2:
                with pytest.raises(MemoryError):
                    optimizer.step()
                backward(model, optimizer)
            optimizer.step()
            scope.log(loss=1.0)
            received.step_ends()
        run = scope.run()
    assert_received(run.parameters, received)


@support("Loops", "a closure that fails in a line search", parameters="right")
def test_closure_that_fails_in_a_line_search(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=4)
    received = Received(model, [optimizer])
    calls = []

    def closure() -> float:
        calls.append(0)
        if len(calls) == 6:
            raise MemoryError
        backward(model, optimizer)
        return 1.0 / len(calls)

    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(STEPS):
            try:
                optimizer.step(closure)
            except MemoryError:
                optimizer.step(closure)
            received.step_ends()
        run = scope.run()
    assert len(calls) > 6
    assert_received(run.parameters, received)


class SharpnessAware(Optimizer):
    """Foret et al. 2021: the step of another optimizer, with the gradient taken nearby."""

    def __init__(self, inner: Optimizer, radius: float) -> None:
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.inner, self.radius = inner, radius

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in held]
        for p in held:
            p.add_(p.grad / p.grad.norm(), alpha=self.radius)
        with torch.enable_grad():
            closure()
        for p, kept in zip(held, before, strict=True):
            p.copy_(kept)
        self.inner.step()


@support("Optimizers", "one within another (sharpness-aware)", parameters="right")
def test_optimizer_within_an_optimizer(tmp_path: Path) -> None:
    """What the inner one is given, and what it changes, is the step."""
    model = mlp_model()
    inner = SGD(model.parameters(), lr=0.1)
    outer = SharpnessAware(inner, radius=0.5)
    received = Received(model, [inner])
    with watch(model, log_dir=tmp_path, every=1) as scope:
        for _ in range(STEPS):
            backward(model, inner)
            outer.step(lambda: backward(model, inner) or 0.0)  # type: ignore[func-returns-value]
            received.step_ends()
        run = scope.run()
    assert_received(run.parameters, received)
