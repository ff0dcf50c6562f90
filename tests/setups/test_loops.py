"""Whatever the loop looks like, what is recorded is what the optimizers were given."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.capture.trainings import mlp_model, vectors
from tests.setups.reference_loops import (
    STEPS,
    Loop,
    assert_passed,
    assert_received,
    backward,
    followed,
    loss_of,
)
from tests.setups.support import support

Build = Callable[[], Loop]


def one_by_one(make: Callable[[nn.Module], Optimizer]) -> Loop:
    model = mlp_model()
    optimizer = make(model)

    def body(number: int) -> None:
        del number
        backward(model, optimizer)
        optimizer.step()

    return Loop(model, [optimizer], body)


# Closures.


def with_closure(make: Callable[[nn.Module], Optimizer], *, keyword: bool = False) -> Loop:
    """Forward and backward inside `step`, as Lightning does."""
    model = mlp_model()
    optimizer = make(model)

    def body(number: int) -> None:
        del number
        x, y = vectors()

        def closure() -> float:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss.item()

        if keyword:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)

    return Loop(model, [optimizer], body)


def lbfgs(model: nn.Module) -> Optimizer:
    return LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")


# Gradients that gather in other ways.


def accumulated() -> Loop:
    model = mlp_model()
    optimizer = AdamW(model.parameters())

    def body(number: int) -> None:
        # The last is shorter, as at the end of an epoch.
        for _ in range(2 if number == STEPS - 1 else 3):
            (loss_of(model) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Loop(model, [optimizer], body)


def several_backwards() -> Loop:
    """Of losses that share a graph: it is kept."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad()
        x, y = vectors()
        output = model(x)
        F.cross_entropy(output, y).backward(retain_graph=True)
        output.square().mean().backward()
        optimizer.step()

    return Loop(model, [optimizer], body)


def gradient_penalty(*, of_parameters: bool) -> Loop:
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad()
        x, y = vectors()
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        wrt = list(model.parameters()) if of_parameters else [x]
        gradients = torch.autograd.grad(loss, wrt, create_graph=True)
        (loss + sum(g.square().sum() for g in gradients)).backward()
        optimizer.step()

    return Loop(model, [optimizer], body)


def kept_graph() -> Loop:
    """`backward(create_graph=True)`: the gradients have a graph of their own."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad()
        x, y = vectors()
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True
        )
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return Loop(model, [optimizer], body)


class Resting(nn.Module):
    """Its last layer rests at every second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
        self.last = nn.Linear(5, 5)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        body: Tensor = self.body(x)
        last: Tensor = self.last(body) if self.forwards % 2 else body
        return last


def zeros_kept() -> Loop:
    """`zero_grad(set_to_none=False)`: a layer that rests keeps its gradient, of zeros."""
    model = Resting()
    optimizer = Adam(model.parameters(), lr=0.01)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        optimizer.step()

    return Loop(model, [optimizer], body)


def parts_called_at_times() -> Loop:
    """At every second step the loop calls the parts of the model, not the model."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        optimizer.zero_grad()
        x, y = vectors()
        if number % 2:
            for part in model:
                x = part(x)
        else:
            x = model(x)
        F.cross_entropy(x, y).backward()
        optimizer.step()

    return Loop(model, [optimizer], body)


def pushed_before_the_step() -> Loop:
    """Gradients that the loop itself changes: clipped by value, with noise."""
    model = mlp_model()
    optimizer = RMSprop(model.parameters(), lr=0.01)

    def body(number: int) -> None:
        del number
        backward(model, optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.001 * torch.randn_like(parameter)
        optimizer.step()

    return Loop(model, [optimizer], body)


def some_skipped() -> Loop:
    """A batch whose gradients are thrown away: the step goes on with the next."""
    model = mlp_model()
    optimizer = AdamW(model.parameters(), lr=0.01)

    def body(number: int) -> None:
        for _ in range(number % 3):
            (loss_of(model) * float("inf")).backward()
            optimizer.zero_grad()
        backward(model, optimizer)
        optimizer.step()

    return Loop(model, [optimizer], body)


# Several optimizers.


def body_and_head(model: nn.Sequential) -> tuple[Optimizer, Optimizer]:
    body = SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    return body, Adam(model[4].parameters(), lr=0.01)


def head_at_every_second_step() -> Loop:
    model = mlp_model()
    slow, fast = body_and_head(model)

    def body(number: int) -> None:
        backward(model, slow, fast)
        fast.step()
        if number % 2:
            slow.step()

    return Loop(model, [slow, fast], body)


def in_backward() -> Loop:
    """An optimizer for each parameter, that steps as soon as the gradient is there."""
    model = mlp_model()
    optimizers: dict[Tensor, Optimizer] = {
        p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()
    }

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return Loop(model, list(optimizers.values()), lambda _: loss_of(model).backward())


# What comes around the training.


def scheduled() -> Loop:
    loop = one_by_one(lambda model: AdamW(model.parameters(), lr=0.1))
    optimizer = loop.optimizers[0]
    schedules = [
        LambdaLR(optimizer, lambda step: 0.5**step),
        OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * STEPS),
    ]
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    train = loop.body

    def body(number: int) -> None:
        train(number)
        for schedule in schedules:
            schedule.step()
        plateau.step(1.0)

    loop.body = body
    return loop


def averaged() -> Loop:
    """An EMA copy made at once, an SWA copy in mid-training; both are evaluated."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    copies = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]

    def body(number: int) -> None:
        backward(model, optimizer)
        if number == 2:
            # Within a step that is recorded: the hooks are copied, too.
            copies.append(AveragedModel(model))
        optimizer.step()
        schedule.step()
        for copy in copies:
            copy.update_parameters(model)
            loss_of(copy)
            update_bn([vectors()[0]], copy)

    return Loop(model, [optimizer], body)


def evaluated() -> Loop:
    """Evaluation and inference wherever they fit."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            loss_of(model)
        with torch.inference_mode():
            loss_of(model)
        model.train()

    def body(number: int) -> None:
        del number
        evaluate()
        optimizer.zero_grad()
        loss = loss_of(model)
        evaluate()
        loss.backward()
        evaluate()
        optimizer.step()
        evaluate()

    return Loop(model, [optimizer], body)


LOOPS: dict[str, dict[str, Build]] = {
    "Optimizers": {
        "SGD": lambda: one_by_one(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9)),
        "SGD, Nesterov": lambda: one_by_one(
            lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        ),
        "SGD, `fused`": lambda: one_by_one(lambda m: SGD(m.parameters(), lr=0.1, fused=True)),
        "SGD, `maximize`": lambda: one_by_one(lambda m: SGD(m.parameters(), lr=0.1, maximize=True)),
        "Adam, `foreach`": lambda: one_by_one(lambda m: Adam(m.parameters(), foreach=True)),
        "AdamW, `foreach`": lambda: one_by_one(lambda m: AdamW(m.parameters(), foreach=True)),
        "Adam, `fused`": lambda: one_by_one(lambda m: Adam(m.parameters(), fused=True)),
        "AdamW, `fused`": lambda: one_by_one(lambda m: AdamW(m.parameters(), fused=True)),
        "LBFGS": lambda: with_closure(lbfgs),
        "closure: backward within `step`": lambda: with_closure(lambda m: AdamW(m.parameters())),
        "closure by keyword": lambda: with_closure(
            lambda m: SGD(m.parameters(), lr=0.1), keyword=True
        ),
        "several, one at every second step": head_at_every_second_step,
        "one per parameter, in backward": in_backward,
        "schedulers": scheduled,
        "EMA and SWA copies": averaged,
    },
    "Loops": {
        "gradient accumulation": accumulated,
        "several backwards, `retain_graph`": several_backwards,
        "gradient penalty on the input": lambda: gradient_penalty(of_parameters=False),
        "gradient penalty on the parameters": lambda: gradient_penalty(of_parameters=True),
        "gradients with a graph, `create_graph`": kept_graph,
        "`zero_grad(set_to_none=False)`": zeros_kept,
        "batches thrown away": some_skipped,
        "gradients changed by the loop": pushed_before_the_step,
        "evaluation and inference in between": evaluated,
    },
}

# What arrives at an output comes in several parts, which only their sum makes the gradient.
IN_PARTS = {"several backwards, `retain_graph`"}


def loops() -> Iterator[ParameterSet]:
    for area, named in LOOPS.items():
        for name, build in named.items():
            shown = support(
                area,
                name,
                parameters="right",
                outputs="right",
                output_gradients="labelled" if name in IN_PARTS else "right",
            )
            yield pytest.param(name, build, marks=shown, id=name)


@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize(("name", "build"), list(loops()))
def test_records_what_optimizers_and_modules_received(
    name: str, build: Build, given: bool, tmp_path: Path
) -> None:
    loop = followed(build, tmp_path, given=given)
    run = loop.run
    assert list(run.steps) == list(range(STEPS))
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)
    assert list(run.scalars["loss"]) == list(range(STEPS))
    said = [problem["message"] for problem in run.meta["problems"]]
    if name in IN_PARTS:
        (message,) = said
        assert "is not added up" in message
    else:
        assert said == []
    assert np.isfinite(run.scalars["learning_rate"]).all()


def test_parts_that_the_loop_calls_itself_are_seen_from_the_second_time_on(tmp_path: Path) -> None:
    loop = followed(parts_called_at_times, tmp_path)
    assert_received(loop.run.parameters, loop.received)
    # When the first of these forwards begins no step is open: nothing is known of it.
    missed = loop.passed.steps[1]
    loop.passed.steps[1] = {name: {} for name in missed}
    assert missed
    assert_passed(loop.run.modules, loop.passed)
