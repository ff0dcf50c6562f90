"""How a watch ends: by exceptions, twice, early, or because another begins."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import gradscope
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.log.reader import load
from tests.capture.trainings import mlp_model, sgd, vectors


class Fragile(nn.Module):
    """Raises in mid-forward when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        out: Tensor = self.last(x)
        return out


def hook_count(model: nn.Module, optimizer: Optimizer) -> int:
    holders = [*model.modules(), optimizer]
    return sum(
        len(value)
        for holder in holders
        for name, value in vars(holder).items()
        if "hook" in name and isinstance(value, dict)
    )


def train(model: nn.Module, optimizer: Optimizer, scope: Scope, steps: int) -> None:
    for _ in range(steps):
        x, y = vectors()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scope.log(loss=loss)


@pytest.mark.parametrize("error", [RuntimeError("bad batch"), KeyboardInterrupt(), SystemExit(1)])
def test_log_is_complete_and_hooks_are_gone_after_an_exception(
    error: BaseException, tmp_path: Path
) -> None:
    model = Fragile()
    optimizer = sgd(model)
    untouched = hook_count(model, optimizer)

    def training() -> None:
        with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
            train(model, optimizer, scope, 3)
            model.error = error
            model(vectors()[0])

    with pytest.raises(type(error)):
        training()
    assert hook_count(model, optimizer) == untouched
    run = load(tmp_path)
    assert list(run.recorded_steps) == [0, 1, 2]
    assert not np.isnan(run.scalars["loss"]).any()
    assert run.meta["left_out"] == []
    assert type(error).__name__ in str(run.meta["problems"])


@pytest.mark.parametrize("armed", [False, True], ids=["before recording", "while recording"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("part", ["", "first"])
def test_close_inside_a_forward(part: str, where: str, armed: bool, tmp_path: Path) -> None:
    """Torch still calls hooks that are removed while it goes through them."""
    model = Fragile()
    optimizer = sgd(model)
    untouched = hook_count(model, optimizer)
    module = model.get_submodule(part)
    kept: list[tuple[Scope, RemovableHandle]] = []

    def close(*_: object) -> None:
        for scope, handle in kept:
            handle.remove()
            scope.close()

    def register() -> RemovableHandle:
        if where == "before":
            return module.register_forward_pre_hook(close)
        return module.register_forward_hook(close)

    # Whose hook comes first matters.
    first = None if armed else register()
    scope = watch(model, optimizer, log_dir=tmp_path, every=1)
    if armed:
        model(vectors()[0])
    kept.append((scope, first or register()))
    x, y = vectors()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert hook_count(model, optimizer) == untouched


def test_exception_that_the_user_catches_does_not_end_the_watch(tmp_path: Path) -> None:
    model = Fragile()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        train(model, optimizer, scope, 1)
        model.error = RuntimeError("bad batch")
        with pytest.raises(RuntimeError):
            model(vectors()[0])
        model.error = None
        train(model, optimizer, scope, 2)
        run = scope.run()
    assert list(run.steps) == [0, 1, 2]
    assert run.meta["problems"] == []


def test_report_and_run_before_any_step(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, sgd(model), log_dir=tmp_path) as scope:
        assert len(scope.run().steps) == 0
        assert scope.report().run.parameters.values.shape[1:] == (0, 0)
        model(vectors()[0])
        assert len(scope.run().steps) == 0


@pytest.mark.parametrize("temporary", [True, False])
def test_run_is_the_same_after_close(temporary: bool, tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    scope = watch(model, optimizer, log_dir=None if temporary else tmp_path, every=1)
    train(model, optimizer, scope, 3)
    open_run = scope.run()
    scope.close()
    scope.close()
    closed_run = scope.run()
    assert list(closed_run.steps) == [0, 1, 2]
    np.testing.assert_array_equal(open_run.parameters.values, closed_run.parameters.values)
    assert scope.report().run.parameters.names == closed_run.parameters.names
    # Whoever goes on training goes unseen.
    train(model, optimizer, scope, 2)
    assert list(scope.run().steps) == [0, 1, 2]


def test_step_that_was_open_at_close_is_in_the_log(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    scope = watch(model, optimizer, log_dir=tmp_path, every=1)
    train(model, optimizer, scope, 3)
    scope.close()
    assert list(load(tmp_path).recorded_steps) == [0, 1, 2]


def test_temporary_folder_goes_with_the_scope() -> None:
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer) as scope:
        train(model, optimizer, scope, 1)
    folder = scope.log_dir
    assert folder.is_dir()
    del scope
    gc.collect()
    assert not folder.exists()


def test_live_run_equals_the_run_loaded_later(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        train(model, optimizer, scope, 3)
        live = scope.run()
    later = gradscope.load(tmp_path)
    for table in ("parameters", "modules", "signals"):
        np.testing.assert_array_equal(getattr(live, table).values, getattr(later, table).values)
        assert getattr(live, table).entities == getattr(later, table).entities
    assert dict(live.scalars).keys() == dict(later.scalars).keys()
    for name, values in live.scalars.items():
        np.testing.assert_array_equal(values, later.scalars[name])
    assert live.meta["coverage"]["closed_steps"] == later.meta["coverage"]["closed_steps"] == 3


def test_live_and_later_reports_tell_the_same_cost(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    scope = watch(model, optimizer, log_dir=tmp_path, every=1)
    train(model, optimizer, scope, 3)
    during = scope.run().meta["coverage"]
    assert during == load(tmp_path).meta["coverage"]
    scope.close()
    later = load(tmp_path).meta["coverage"]
    assert later["seconds_watched"] > during["seconds_watched"] > during["seconds_in_hooks"] > 0
    # Time goes on, and others train: not for what is closed.
    train(model, optimizer, scope, 2)
    assert scope.run().meta["coverage"] == scope.report().run.meta["coverage"] == later


@pytest.mark.parametrize("steps", [1, 5, 16, 21])
def test_what_was_seen_is_in_the_log_before_the_end(steps: int, tmp_path: Path) -> None:
    """As a kill would leave it: at least half of the recorded steps are counted."""
    model = mlp_model()
    optimizer = sgd(model)
    scope = watch(model, optimizer, log_dir=tmp_path, every=1)
    # The last step is open still.
    train(model, optimizer, scope, steps + 1)
    scope._recorder.flush()
    killed = load(tmp_path).meta["coverage"]
    assert steps / 2 < killed["recorded_steps"] == killed["closed_steps"] <= steps
    assert killed["forwards"] == killed["recorded_steps"]
    assert 0 < killed["seconds_in_hooks"] < killed["seconds_watched"]
    scope.close()
    assert load(tmp_path).meta["coverage"]["recorded_steps"] == steps + 1


@pytest.mark.parametrize("given", [True, False])
def test_an_exception_before_the_first_step_is_the_reason(given: bool, tmp_path: Path) -> None:
    model = Fragile()
    model.error = RuntimeError("bad batch")
    with (
        pytest.raises(RuntimeError, match="bad batch"),
        watch(model, sgd(model) if given else None, log_dir=tmp_path) as scope,
    ):
        model(vectors()[0])
    for report in (scope.report(), gradscope.analyze(load(tmp_path))):
        (finding,) = report.findings
        assert "the model ran once, but no optimizer stepped" in finding.message
        assert "training ended with RuntimeError" in finding.message
        assert "watch()" not in finding.remedies[0]


def test_second_watch_closes_the_first_with_a_warning(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    untouched = hook_count(model, optimizer)
    first = watch(model, optimizer, log_dir=tmp_path / "first", every=1)
    train(model, optimizer, first, 2)
    closed = "watched already; the earlier watch is closed"
    with pytest.warns(GradscopeWarning, match=closed) as said:
        second = watch(model, optimizer, log_dir=tmp_path / "second", every=1)
    assert len(said) == 1
    train(model, optimizer, second, 3)
    second.close()
    assert list(load(tmp_path / "first").steps) == [0, 1]
    assert list(load(tmp_path / "second").steps) == [0, 1, 2]
    assert hook_count(model, optimizer) == untouched


def test_two_models_are_watched_side_by_side(tmp_path: Path) -> None:
    first, second = mlp_model(), mlp_model()
    steppers = {first: sgd(first), second: sgd(second)}
    with (
        watch(first, log_dir=tmp_path / "a", every=1) as one,
        watch(second, log_dir=tmp_path / "b", every=1) as two,
    ):
        train(first, steppers[first], one, 2)
        train(second, steppers[second], two, 3)
        assert list(one.run().steps) == [0, 1]
        assert list(two.run().steps) == [0, 1, 2]


def test_moving_the_model_after_watch_is_harmless(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        model.to(torch.float64)
        optimizer = sgd(model)
        for _ in range(2):
            x, y = vectors(torch.float64)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        run = scope.run()
    assert list(run.steps) == [0, 1]
    assert not np.isnan(run.parameters["grad_norm"]).any()
