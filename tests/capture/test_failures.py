"""When gradscope itself fails, training goes on, and what is missing is said."""

import errno
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from tensorboard.compat.proto import event_pb2
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture import derive, parameters, pulses, scaling, statistics
from gradscope.capture.cadence import Cadence
from gradscope.capture.entities import Roster
from gradscope.capture.events import Events
from gradscope.capture.handover import Handover
from gradscope.capture.modules import ModuleTaps
from gradscope.capture.observer import Observer
from gradscope.capture.pulses import Pulses
from gradscope.capture.recorder import Rows
from gradscope.capture.replaced import Former
from gradscope.capture.scaling import LossScaling
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter
from gradscope.record import Run
from tests.capture.reference import wide
from tests.capture.trainings import mlp_model, sgd, vectors

STEPS = 6


def fail(*_: object, **__: object) -> NoReturn:
    message = "out of luck"
    raise RuntimeError(message)


def disk_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


Between = Callable[[Scope, int], None]


def unbroken(scope: Scope, number: int) -> None:
    del scope, number


def train(scope: Scope | None, model: nn.Module, between: Between = unbroken) -> list[float]:
    """The weights that six steps lead to."""
    optimizer = sgd(model)
    for number in range(STEPS):
        torch.manual_seed(number)
        x, y = vectors()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scope is not None:
            scope.log(loss=loss, accuracy=0.5)
            between(scope, number)
    return [float(value) for p in model.parameters() for value in wide(p)]


def watch_training(
    model: nn.Module, log_dir: Path, between: Between = unbroken
) -> tuple[list[float], Run]:
    """The weights and the run, with something done between the steps."""
    with watch(model, log_dir=log_dir, every=1) as scope:
        weights = train(scope, model, between)
        run = scope.run()
        scope.report()
    return weights, run


class Shift(nn.Module):
    """Adds the one row of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Embedding(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        shifted: Tensor = x + self.row(torch.zeros(len(x), dtype=torch.int64))
        return shifted


def shifted_model() -> nn.Module:
    """With a parameter of every kind that something else is measured of."""
    return nn.Sequential(Shift(), *mlp_model())


@pytest.fixture
def seeded() -> nn.Module:
    torch.manual_seed(0)
    return shifted_model()


@pytest.fixture
def expected() -> list[float]:
    torch.manual_seed(0)
    return train(None, shifted_model())


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Between]:
    """Replace something after a step, when all up to that step is in the log."""

    def make(step: int, holder: object, name: str, broken: Callable[..., NoReturn]) -> Between:
        def between(scope: Scope, number: int) -> None:
            if number == step:
                scope.run()
                monkeypatch.setattr(holder, name, broken)

        return between

    return make


BROKEN: dict[str, object] = {
    name: statistics
    for name, function in vars(statistics).items()
    # `underflows` looks at half precision alone; `widest` at what is not on this CPU; `squares` at
    # what is not small; `evenly_spaced` is for half precision and level "deep" (test_deep.py).
    if inspect.isfunction(function) and not name.startswith("_")
    if name not in {"underflows", "widest", "squares", "evenly_spaced"}
}
BROKEN |= {"tables": derive, "step": RunWriter, "_measure": ModuleTaps}
BROKEN |= {"_ensure_open": Observer, "close_step": Observer, "_number": Pulses}
BROKEN |= {"step_closed": Handover, "flush": Handover, "offer": Handover, "coverage": Handover}
BROKEN |= {
    "_packet": Handover,
    "_write_new_entities": Handover,
    "seconds": Handover,
}
BROKEN |= {"propose": Cadence, "closed": Events}
BROKEN |= {"remember": Former, "among": Former, "left_behind": Roster, "condense": Rows}


@pytest.mark.parametrize("what", BROKEN)
def test_training_goes_on_and_the_part_is_named(
    what: str,
    seeded: nn.Module,
    expected: list[float],
    break_at: Callable[..., Between],
    tmp_path: Path,
) -> None:
    # Not from the first step on, so that there is something before.
    broken = break_at(1, BROKEN[what], what, fail)
    with pytest.warns(GradscopeWarning) as caught:
        weights, run = watch_training(seeded, tmp_path, broken)
    assert weights == expected
    said = [str(w.message) for w in caught if "disabled" in str(w.message)]
    assert said
    # Each part once.
    assert len(set(said)) == len(said)
    for text in said:
        assert "out of luck" in text
        assert text.removeprefix("gradscope: ") in str(run.meta["problems"])
    # What was recorded before is still there.
    assert {0, 1} <= {int(step) for step in run.recorded_steps}


def test_what_breaks_is_where_the_lists_look() -> None:
    assert "moments" in BROKEN
    assert all(hasattr(holder, name) for name, holder in [*BROKEN.items(), *BROKEN_SCALING])
    # Whatever is added to these is broken, too.
    listed = {(name, holder) for name, holder in [*BROKEN.items(), *BROKEN_SCALING]}
    for holder in (Handover, LossScaling):
        methods = {name for name in vars(holder) if not name.startswith("__")}
        # That is asked under a budget alone, by `propose`; once in a run (test_graph_safety.py).
        elsewhere = {"record_bytes", "graph"}
        assert {(name, holder) for name in methods - elsewhere} <= listed


def train_scaled(
    scope: Scope | None, model: nn.Module, scaler: GradScaler, between: Between = unbroken
) -> list[float]:
    """The weights that six steps lead to, the third of which is skipped."""
    optimizers = [
        SGD(model[0].parameters(), lr=0.1),  # type: ignore[index]
        SGD(model[2:].parameters(), lr=0.1, fused=True),  # type: ignore[index]
    ]
    for number in range(STEPS):
        torch.manual_seed(number)
        x, y = vectors()
        if number == 2:
            x[0, 0] = torch.inf
        loss = F.cross_entropy(model(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(loss))
        clip = nn.utils.clip_grad_norm_
        if scope is None:
            clip(model.parameters(), 1e9)
        else:
            scope.clip_grad_norm_(1e9)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if scope is not None:
            scope.log(loss=loss)
            between(scope, number)
    return [float(value) for p in model.parameters() for value in wide(p)]


def watch_scaled(
    model: nn.Module, log_dir: Path, scaler: GradScaler, between: Between
) -> tuple[list[float], Run]:
    with watch(model, log_dir=log_dir, every=1, scaler=scaler) as scope:
        weights = train_scaled(scope, model, scaler, between)
        run = scope.run()
        scope.report()
    return weights, run


def make_scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


BROKEN_SCALING: list[tuple[str, Any]] = [
    (name, LossScaling) for name in vars(LossScaling) if not name.startswith("__")
]
# Where they are used.
BROKEN_SCALING += [("beside", pulses), ("beside", parameters), ("unless", parameters)]
BROKEN_SCALING += [("unscaled", parameters), ("divided", parameters), ("beside", scaling)]


@pytest.mark.parametrize(
    ("what", "holder"), BROKEN_SCALING, ids=[f"{h.__name__}-{n}" for n, h in BROKEN_SCALING]
)
def test_training_with_a_scaler_goes_on(
    what: str,
    holder: object,
    seeded: nn.Module,
    break_at: Callable[..., Between],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    expected = train_scaled(None, shifted_model(), make_scaler())
    scaler = make_scaler()
    is_property = isinstance(vars(holder)[what], property)
    broken = break_at(1, holder, what, property(fail) if is_property else fail)
    with pytest.warns(GradscopeWarning) as caught:
        weights, run = watch_scaled(seeded, tmp_path, scaler, broken)
    assert weights == expected
    said = [str(w.message) for w in caught if "disabled" in str(w.message)]
    assert len(set(said)) == len(said) > 0
    for text in said:
        assert "out of luck" in text
        assert text.removeprefix("gradscope: ") in str(run.meta["problems"])
    assert {0, 1} <= {int(step) for step in run.recorded_steps}


def test_broken_half_precision_does_not_cost_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "underflows", fail)
    model = mlp_model(torch.bfloat16)
    x, y = vectors(torch.bfloat16)
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        with pytest.warns(GradscopeWarning, match="module outputs disabled"):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        run = scope.run()
    assert (run.parameters["grad_norm"] > 0).all()


def test_broken_outputs_do_not_cost_the_parameters(
    seeded: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModuleTaps, "_measure", fail)
    with pytest.warns(GradscopeWarning, match="module outputs disabled"):
        _, run = watch_training(seeded, tmp_path)
    assert list(run.recorded_steps) == list(range(STEPS))
    assert (run.parameters["grad_norm"] > 0).all()
    assert not np.isnan(run.scalars["loss"]).any()


def test_warnings_as_errors_do_not_stop_training(
    seeded: nn.Module, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As this test suite runs, and as `python -W error` does.
    monkeypatch.setattr(ModuleTaps, "_measure", fail)
    weights, run = watch_training(seeded, tmp_path)
    assert weights == expected
    assert run.meta["problems"] != []


class UnspeakableError(Exception):
    """Its own text can't be made."""

    def __str__(self) -> str:
        message = "no words"
        raise AttributeError(message)


def fail_without_words(*_: object, **__: object) -> NoReturn:
    raise UnspeakableError


def test_error_that_can_not_be_put_into_words_does_not_stop_training(
    seeded: nn.Module, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModuleTaps, "_measure", fail_without_words)
    with pytest.warns(GradscopeWarning, match=r"module outputs disabled: UnspeakableError"):
        weights, _ = watch_training(seeded, tmp_path)
    assert weights == expected


def test_full_disk(
    seeded: nn.Module,
    expected: list[float],
    break_at: Callable[..., Between],
    tmp_path: Path,
) -> None:
    fill = break_at(2, RunWriter, "_write", disk_full)
    with pytest.warns(GradscopeWarning) as caught:
        weights, run = watch_training(seeded, tmp_path, fill)
    assert weights == expected
    said = [str(w.message) for w in caught]
    assert len(said) == 1
    assert "log disabled" in said[0]
    assert "No space left" in said[0]
    assert str(tmp_path) in said[0]
    assert list(run.recorded_steps) == [0, 1, 2]
    assert "log" in {problem["part"] for problem in run.meta["problems"]}
    assert list(load(tmp_path).recorded_steps) == [0, 1, 2]


def write_half(writer: RunWriter, event: event_pb2.Event) -> NoReturn:
    data = event.SerializeToString()
    writer._file.write(data[: len(data) // 2])
    disk_full()


def test_disk_that_fills_in_the_middle_of_a_record(
    seeded: nn.Module,
    expected: list[float],
    break_at: Callable[..., Between],
    tmp_path: Path,
) -> None:
    fill = break_at(2, RunWriter, "_write", write_half)
    with pytest.warns(GradscopeWarning, match="No space left"):
        weights, run = watch_training(seeded, tmp_path, fill)
    assert weights == expected
    assert list(run.recorded_steps) == [0, 1, 2]
    assert len(run.meta["left_out"]) == 1


def test_folder_that_is_deleted_in_mid_training(
    seeded: nn.Module, expected: list[float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def delete(scope: Scope, number: int) -> None:
        del scope
        if number == 2:
            shutil.rmtree(folder)

    with pytest.warns(GradscopeWarning, match="can't be read back") as caught:
        weights, run = watch_training(seeded, folder, delete)
    assert weights == expected
    assert len(caught) == 1
    assert "log" in {problem["part"] for problem in run.meta["problems"]}
    assert run.meta["model"] == "Sequential"


def test_bad_names_and_values_given_to_log_do_not_stop_training(
    seeded: nn.Module, expected: list[float], tmp_path: Path
) -> None:
    odd: dict[str, Any] = {"a name / with \n signs": 1.0, "": 2.0}
    nonsense: dict[str, Any] = {"loss": object(), "step": 3}

    def log(scope: Scope, number: int) -> None:
        del number
        scope.log(**nonsense)
        scope.log(**odd)

    with pytest.warns(GradscopeWarning) as caught:
        weights, run = watch_training(seeded, tmp_path, log)
    assert weights == expected
    assert sum("only numbers can be logged" in str(w.message) for w in caught) == 1
    assert list(run.steps) == list(range(STEPS))
    assert list(run.scalars["a name / with \n signs"]) == [1.0] * STEPS
