"""Training ends at the first error where the user asked for it, between two steps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradscope.analysis.finding import Finding
from gradscope.errors import TrainingStopped
from gradscope.log import reader
from tests.capture.telling import (
    ERROR,
    LOSS,
    NAN,
    GetJudge,
    always,
    every_step,
    finding,
    finish_analysis,
    train,
    watched,
    weights,
)
from tests.capture.test_bad_input import hooks_of
from tests.capture.trainings import mlp_model, sgd, vectors


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_stop_ends_training_before_the_next_step(
    analysis_clock: SimpleNamespace, judge: GetJudge, tmp_path: Path
) -> None:
    judge({1: [finding(), ERROR], 2: [finding(), ERROR], 3: [finding(), ERROR]})
    model = mlp_model()
    after: list[list[Tensor]] = []

    def note(_: int) -> None:
        analysis_clock.seconds += 10.0
        after.append(weights(model))

    scope = watched(model, log_dir=tmp_path, on_finding="stop")
    with pytest.raises(TrainingStopped, match="GS401 gs401: …") as stopped, scope:
        train(model, 9, note)
    # A warning is no reason to stop.
    assert stopped.value.findings == (ERROR,)
    # The analyses of steps 1 and 2 have it; it is said when step 4 begins: the weights are whole.
    assert len(after) == 4
    for left, kept in zip(weights(model), after[-1], strict=True):
        assert torch.equal(left, kept)
    assert scope.is_closed
    assert hooks_of(model) == hooks_of(mlp_model())
    run = reader.load(tmp_path)
    assert run.recorded_steps.tolist() == list(range(4))
    assert [p["message"] for p in run.meta["problems"]] == ["training ended with TrainingStopped"]


def test_training_may_go_on_after_it_was_stopped(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    judge(always([NAN]))
    model = mlp_model()
    with watched(model, on_finding="stop") as scope:
        with pytest.raises(TrainingStopped):
            train(model, 9, every_step(analysis_clock))
        done = scope.run().recorded_steps.size
        train(model, 3, every_step(analysis_clock))
    assert scope.run().recorded_steps.size == done + 3


def test_at_the_end_there_is_nothing_to_stop(judge: GetJudge) -> None:
    judge({0: [NAN]})
    model = mlp_model()
    with watched(model, on_finding="stop") as scope:
        train(model, 2)
    assert scope.is_closed


def test_the_users_function_may_stop_training(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    judge(always([finding(), NAN]))

    def tell(found: Finding) -> None:
        if found.code == "GS101":
            raise TrainingStopped((found,))

    model = mlp_model()
    with pytest.raises(TrainingStopped, match="GS101"), watched(model, on_finding=tell):
        train(model, 9, every_step(analysis_clock))


def accumulating(model: nn.Module, optimizer: SGD) -> Iterator[int]:
    """Two micro-batches a step."""
    for number in range(20):
        for _ in range(2):
            x, y = vectors()
            LOSS(model(x), y).backward()
        yield number
        optimizer.step()
        optimizer.zero_grad()


def by_parts(model: nn.Module, optimizer: SGD) -> Iterator[int]:
    """The model's own forward is never called."""
    for number in range(20):
        x, y = vectors()
        for part in model.children():
            x = part(x)
        LOSS(x, y).backward()
        yield number
        optimizer.step()
        optimizer.zero_grad()


def without_forward(model: nn.Module, optimizer: SGD) -> Iterator[int]:
    """A loop in which no module runs: only the optimizer is seen."""
    for number in range(20):
        nn.utils.parameters_to_vector(model.parameters()).square().sum().backward()
        yield number
        optimizer.step()
        optimizer.zero_grad()


def in_backward(model: nn.Module, optimizer: SGD) -> Iterator[int]:
    """Each parameter is updated as soon as its gradient is there."""
    del optimizer
    each = {p: sgd(nn.ParameterList([p])) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        each[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for number in range(20):
        x, y = vectors()
        LOSS(model(x), y).backward()
        yield number


Loop = Callable[[nn.Module, SGD], Iterator[int]]


@pytest.mark.parametrize("loop", [accumulating, by_parts, without_forward, in_backward])
def test_stopped_where_no_step_is_half_done(
    loop: Loop, analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    # What stops it comes to light at a moment within a step; it waits for the step to end.
    judge(always([NAN]))
    model = mlp_model()
    done: list[int] = []

    def run_loop() -> None:
        for number in loop(model, SGD(model.parameters(), 0.1)):
            analysis_clock.seconds += 10.0
            finish_analysis()
            done.append(number)

    with watched(model, on_finding="stop") as scope:
        with pytest.raises(TrainingStopped):
            run_loop()
        gathered = scope._observer._open
        assert gathered is None or gathered.stepped
    assert 0 < len(done) < 20
    # All that was begun was recorded, each step whole.
    run = scope.run()
    assert (run.parameters["grad_missing"] == 0).all()


def test_a_compiled_model_is_stopped_too(analysis_clock: SimpleNamespace, judge: GetJudge) -> None:
    judge(always([NAN]))
    model = mlp_model()
    compiled = torch.compile(model, backend="aot_eager")
    with watched(model, on_finding="stop"), pytest.raises(TrainingStopped):
        train(compiled, 9, every_step(analysis_clock))


def test_a_training_that_blows_up_is_stopped() -> None:
    model = mlp_model()
    optimizer = SGD(model.parameters(), 0.1)
    seen: list[int] = []

    def run_loop() -> None:
        for number in range(200):
            x, y = vectors()
            loss = LOSS(model(x), y) * (float("nan") if number == 20 else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(number)
            finish_analysis()

    with pytest.raises(TrainingStopped) as stopped, watched(model, on_finding="stop"):
        run_loop()
    assert {found.code for found in stopped.value.findings} & {"GS501", "GS503"}
    assert 20 <= len(seen) < 200
