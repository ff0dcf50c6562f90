"""Findings, worst layers and pictures in TensorBoard: when they are refreshed, and failures."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from tensorboard.backend.event_processing import event_file_loader
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope.analysis import analyzer
from gradscope.analysis.report import Report
from gradscope.capture import display
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.log import reader
from gradscope.log.reader import load
from gradscope.log.writer import run_files
from gradscope.record import Run
from gradscope.reporters import tensorboard
from tests.capture.reference import wide
from tests.capture.trainings import mlp_model, sgd, vectors

TEXTS = ["gradscope/findings", "gradscope/worst_layers"]
PICTURES = ["gradscope/gradient_by_depth", "gradscope/heatmap"]

pytestmark = pytest.mark.usefixtures("pictures")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as the display sees it."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def train(scope: Scope | None, model: nn.Module, steps: int) -> list[float]:
    """The weights that the training leads to."""
    optimizer = sgd(model)
    for number in range(steps):
        torch.manual_seed(number)
        x, y = vectors()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scope is not None:
            scope.log(loss=loss)
    return [float(value) for p in model.parameters() for value in wide(p)]


def shown(log_dir: Path) -> dict[str, list[int]]:
    """Of all that TensorBoard alone shows, the steps."""
    (path,) = run_files(log_dir)
    found: dict[str, list[int]] = {}
    for event in event_file_loader.EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name in {"text", "images"}:
                found.setdefault(value.tag, []).append(event.step)
    return found


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> Callable[[float], None]:
    """Make the report take so many seconds, without drawing anything."""

    def cost(seconds: float) -> None:
        def slow(report: object) -> str:
            del report
            clock.seconds += seconds
            return "text"

        monkeypatch.setattr(tensorboard, "findings_markdown", slow)
        monkeypatch.setattr(tensorboard, "pictures", lambda _: {})

    return cost


def refreshed_at(
    clock: SimpleNamespace, log_dir: Path, steps: int, seconds_per_step: float
) -> list[int]:
    """The steps at which the findings were shown."""
    model = mlp_model()
    with watch(model, log_dir=log_dir, every=1) as scope:
        optimizer = sgd(model)
        for _ in range(steps):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            clock.seconds += seconds_per_step
            scope.log(loss=1.0)
    return shown(log_dir)["gradscope/findings"]


def test_refreshes_become_rarer(
    clock: SimpleNamespace, ticking: Callable[[float], None], tmp_path: Path
) -> None:
    ticking(0.0)
    # The first hundred seconds are left alone: five steps. Then at every doubling, and at the end.
    assert refreshed_at(clock, tmp_path, 100, 20.0) == [4, 9, 19, 39, 79, 99]


def test_refreshes_take_no_more_than_a_percent_of_the_time(
    clock: SimpleNamespace, ticking: Callable[[float], None], tmp_path: Path
) -> None:
    ticking(1.0)
    # Each comes when a hundred seconds have gone by since the last; the clock also counts those.
    assert refreshed_at(clock, tmp_path, 300, 1.0) == [99, 199, 299]


def test_a_short_training_has_its_pictures_at_the_end(
    clock: SimpleNamespace, tmp_path: Path
) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        clock.seconds = 99.9
        train(scope, model, 6)
    assert shown(tmp_path) == {tag: [5] for tag in TEXTS + PICTURES}


def watch_for_long(clock: SimpleNamespace, log_dir: Path) -> list[float]:
    """The weights that five steps lead to, each of which may be a moment to refresh."""
    torch.manual_seed(0)
    model = mlp_model()
    with watch(model, log_dir=log_dir, every=1) as scope:
        clock.seconds += 1e6
        return train(scope, model, 5)


def test_training_and_its_record_do_not_change(clock: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = train(None, mlp_model(), 5)
    assert watch_for_long(clock, tmp_path) == expected
    # Refreshed at the first, second and fourth recorded step, and at the end.
    assert shown(tmp_path) == {tag: [0, 1, 3, 4] for tag in TEXTS + PICTURES}
    run = load(tmp_path)
    assert run.steps.tolist() == run.recorded_steps.tolist() == list(range(5))
    assert run.meta["problems"] == []
    assert run.meta["left_out"] == []


def fail(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EIO, "no canvas")


FAILURES = {
    "pictures": ("pictures for TensorBoard", PICTURES),
    "worst_layers_markdown": ("worst layers as text", TEXTS[1:]),
    "findings_markdown": ("findings as text", TEXTS[:1]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_is_disabled_and_said_once(
    name: str, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part, missing = FAILURES[name]
    monkeypatch.setattr(tensorboard, name, fail)
    torch.manual_seed(0)
    expected = train(None, mlp_model(), 5)
    with pytest.warns(GradscopeWarning, match=f"{part} disabled: OSError.*no canvas") as said:
        weights = watch_for_long(clock, tmp_path)
    assert weights == expected
    assert len(said) == 1
    assert [problem["part"] for problem in load(tmp_path).meta["problems"]] == [part]
    # At close, too, all the rest is shown, and the last step is in the log.
    found = shown(tmp_path)
    assert not set(found) & set(missing)
    others = set(TEXTS + PICTURES) - set(missing)
    assert {tag: steps[-1] for tag, steps in found.items()} == dict.fromkeys(others, 4)
    assert load(tmp_path).steps.tolist() == list(range(5))


def test_a_report_that_can_not_be_made_costs_no_step(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(analyzer, "analyze", fail)
    with pytest.warns(GradscopeWarning, match="the report in TensorBoard disabled: .*no canvas"):
        watch_for_long(clock, tmp_path)
    assert shown(tmp_path) == {}
    assert load(tmp_path).recorded_steps.tolist() == list(range(5))


def test_a_temporary_run_is_shown_to_nobody(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever was called would fail, and warn.
    for name in ("pictures", "findings_markdown", "worst_layers_markdown"):
        monkeypatch.setattr(tensorboard, name, fail)
    model = mlp_model()
    with watch(model, every=1) as scope:
        clock.seconds = 1e6
        train(scope, model, 4)
    assert scope.run().meta["problems"] == []


def test_of_a_long_run_a_part_is_shown_and_the_report_has_it_all(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reader, "_MOST", 20_000)
    seen: list[Run] = []

    def note(report: Report) -> str:
        seen.append(report.run)
        return "text"

    monkeypatch.setattr(tensorboard, "findings_markdown", note)
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        clock.seconds = 9.9
        train(scope, model, 60)
    (part,) = seen
    assert 20 < len(part.recorded_steps) < 40
    assert part.recorded_steps[-1] == part.steps[-1] == 59
    assert "step of a long run" in part.meta["left_out"][0]
    whole = scope.report().run
    assert whole.recorded_steps.tolist() == list(range(60))
    assert whole.meta["left_out"] == []
