"""A run that is resumed goes on as one run."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer

import gradscope
from gradscope.capture.scope import Scope, watch
from gradscope.errors import ConfigError, GradscopeWarning, LogError
from gradscope.log import framing, schema
from gradscope.log.reader import load
from gradscope.log.writer import run_files
from gradscope.record import Run
from gradscope.reporters.provenance import particulars, unseen
from tests.capture.reference import ParameterReference, assert_equal
from tests.capture.trainings import mlp_model, sgd, vectors


class Session:
    """A model and its optimizer, which outlive the watch; every step's reference is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: Optimizer = sgd(model)
        self.reference = ParameterReference(model)
        self.steps = 0

    def train(self, scope: Scope, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(self.steps)
            x, y = vectors()
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.reference.before_update()
            self.optimizer.step()
            self.reference.after_update()
            scope.log(loss=float(self.steps))
            self.steps += 1

    def watched(self, folder: Path, steps: int, **options: Any) -> Run:
        settings = {"every": 1, "resume": True, **options}
        with watch(self.model, self.optimizer, log_dir=folder, **settings) as scope:
            self.train(scope, steps)
            return scope.run()


@pytest.fixture
def session() -> Session:
    torch.manual_seed(0)
    return Session(mlp_model())


def test_sessions_are_one_run_with_every_number(session: Session, tmp_path: Path) -> None:
    first = session.watched(tmp_path, 3)
    session.watched(tmp_path, 2)
    live = session.watched(tmp_path, 4)
    run = gradscope.load(tmp_path)
    assert list(run.steps) == list(range(9))
    assert_equal(run.parameters, session.reference.steps)
    assert list(run.scalars["loss"]) == list(range(9))
    for table in ("parameters", "modules", "signals"):
        assert getattr(run, table).entities == getattr(first, table).entities
        assert list(getattr(run, table).steps) == list(range(9))
        np.testing.assert_array_equal(getattr(run, table).values, getattr(live, table).values)
    assert not np.isnan(run.modules["output_grad_norm"]).any()
    assert [run.histograms.at(step).any() for step in range(9)] == [True] * 9
    assert run.meta["resumed"] == live.meta["resumed"] == [3, 5]
    assert run.meta["created"] == first.meta["created"]
    assert first.meta["resumed"] == run.meta["left_out"] == run.meta["problems"] == []
    assert particulars(run)["Steps"].endswith("resumed at 3, 5")


def test_uninterrupted_and_resumed_read_the_same(tmp_path: Path) -> None:
    """Rules see one run: a fault that lies in both sessions is one finding over all steps."""

    def faulty() -> Session:
        torch.manual_seed(0)
        session = Session(mlp_model())
        assert isinstance(session.model, nn.Sequential)
        # The last layer alone: the others get gradients that nobody uses.
        session.optimizer = SGD(session.model[4].parameters(), lr=0.1)
        return session

    whole = faulty()
    whole.watched(tmp_path / "whole", 8)
    parts = faulty()
    parts.watched(tmp_path / "parts", 2)
    parts.watched(tmp_path / "parts", 6)
    found = [gradscope.analyze(load(tmp_path / name)).findings for name in ("whole", "parts")]
    assert found[0] == found[1]
    (forgotten,) = [finding for finding in found[1] if finding.code == "GS004"]
    assert forgotten.evidence[0].first_step == 0
    assert forgotten.evidence[0].last_step == 7


def test_cadence_counts_from_the_beginning_of_the_run(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 13, every=10)
    run = session.watched(tmp_path, 20, every=10)
    assert list(run.recorded_steps) == [0, 10, 20, 30]
    assert list(run.steps) == list(range(33))


def test_a_resumed_run_does_not_begin_densely_again(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 90, every=None, budget=1e-9)
    run = session.watched(tmp_path, 20, every=None, budget=1e-9)
    later = [step for step in run.recorded_steps.tolist() if step >= 90]
    assert later[0] == 90
    assert len(later) <= 4


@pytest.mark.parametrize("name", ["", "not/yet/there"])
def test_folder_without_a_run_gets_a_new_one(name: str, session: Session, tmp_path: Path) -> None:
    run = session.watched(tmp_path / name, 2)
    assert list(run.steps) == [0, 1]
    assert run.meta["resumed"] == []


def test_number_logged_before_the_first_step_lands_on_it(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 3)
    with watch(session.model, session.optimizer, log_dir=tmp_path, resume=True) as scope:
        scope.log(temperature=7.0)
        session.train(scope, 2)
        temperature = scope.run().scalars["temperature"]
    np.testing.assert_array_equal(temperature, [np.nan, np.nan, np.nan, 7.0, np.nan])


def test_counts_add_up_and_what_was_seen_stays_seen(session: Session, tmp_path: Path) -> None:
    first = session.watched(tmp_path, 3).meta["coverage"]
    session.watched(tmp_path, 0)
    run = session.watched(tmp_path, 4)
    for counts in (run.meta["coverage"], load(tmp_path).meta["coverage"]):
        for name in ("forwards", "optimizer_steps", "closed_steps", "recorded_steps"):
            assert counts[name] == 7
        assert counts["seconds_in_hooks"] > first["seconds_in_hooks"]
        assert counts["loss_seen"] is True
        assert [optimizer["type"] for optimizer in counts["optimizers"]] == ["SGD"]
    # A session that sees nothing forgets nothing.
    idle = session.watched(tmp_path, 0).meta["coverage"]
    assert idle["closed_steps"] == 7
    assert idle["loss_seen"] is True
    assert idle["optimizers"] == run.meta["coverage"]["optimizers"]


def test_watch_of_the_same_model_that_is_still_open_is_closed_first(
    session: Session, tmp_path: Path
) -> None:
    """As when a notebook's cell runs again."""
    scope = watch(session.model, session.optimizer, log_dir=tmp_path, every=1)
    session.train(scope, 3)
    with pytest.warns(GradscopeWarning, match="earlier watch is closed") as said:
        run = session.watched(tmp_path, 2)
    assert len(said) == 1
    assert list(run.steps) == list(range(5))
    assert_equal(run.parameters, session.reference.steps)


def test_other_settings_are_said(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 2)
    run = session.watched(tmp_path, 2, level="parameters")
    assert run.meta["level"] == "full"
    (said,) = unseen(run)
    for words in ("step 2", "level 'parameters'", "'full'"):
        assert words in said


def test_limit_that_every_session_meets_is_said_once(session: Session, tmp_path: Path) -> None:
    def train_without_a_word_of_the_loss() -> Run:
        with watch(session.model, log_dir=tmp_path, resume=True) as scope:
            for _ in range(4):
                x, y = vectors()
                F.cross_entropy(session.model(x), y).backward()
                session.optimizer.step()
            return scope.run()

    for _ in range(2):
        with pytest.warns(GradscopeWarning, match="no loss was seen"):
            live = train_without_a_word_of_the_loss()
        for run in (live, load(tmp_path)):
            assert len(run.meta["problems"]) == 1


# A training, killed over and over: it says when it has done a step.
PROGRAM = """
import sys
import torch
from torch import nn
from gradscope.capture.scope import watch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
scope = watch(model, optimizer, log_dir=sys.argv[1], every=1, resume=True)
while True:
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    scope.log(loss=1.0)
    print("step", flush=True)
"""


def test_killed_again_and_again(tmp_path: Path) -> None:
    ends = []
    for _ in range(2):
        program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            # More than what may wait to be written.
            for _ in range(300):
                assert child.stdout.readline() == "step\n"
            child.kill()
        ends.append(int(load(tmp_path).steps[-1]))
    assert 0 < ends[0] < ends[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    run = Session(model).watched(tmp_path, 3)
    assert list(run.steps) == list(range(ends[1] + 4))
    assert run.meta["resumed"] == [ends[0] + 1, ends[1] + 1]
    assert len(run.parameters.names) == 4
    assert not np.isnan(run.parameters["grad_norm"]).any()
    assert list(run.recorded_steps) == list(run.steps)


# The model.


def test_new_entities_are_appended(session: Session, tmp_path: Path) -> None:
    first = session.watched(tmp_path, 2)
    before = [{**step} for step in session.reference.steps]
    grown = Session(nn.Sequential(*session.model.children(), nn.Linear(5, 5)))
    grown.steps = 2
    run = grown.watched(tmp_path, 2)
    for table in ("parameters", "modules"):
        known = getattr(first, table).entities
        assert getattr(run, table).entities[: len(known)] == known
    assert run.parameters.names[len(first.parameters.names) :] == ("5.weight", "5.bias")
    assert run.modules.names[len(first.modules.names) :] == ("5",)
    for step in before:
        step |= {"5.weight": {}, "5.bias": {}}
    assert_equal(run.parameters, [*before, *grown.reference.steps])


def test_changed_shape_is_refused_by_name(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = mlp_model()
    other[2] = nn.Linear(16, 9)
    said = r"2\.weight has shape \(9, 16\).*to be resumed \(8, 16\)"
    with pytest.raises(ConfigError, match=said):
        watch(other, log_dir=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_another_model_is_refused(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 2)
    wrapped = nn.ModuleDict({"module": session.model})
    with pytest.raises(ConfigError, match=r"ModuleDict has no parameter of the run.*0\.weight"):
        watch(wrapped, log_dir=tmp_path, resume=True)


def test_lazy_parameters_are_not_judged_before_they_have_a_shape(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 5))
        optimizer = sgd(model)
        with watch(model, log_dir=tmp_path, every=1, resume=True) as scope:
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            names.append(scope.run().parameters.names)
    assert names[0] == names[1]
    assert list(load(tmp_path).steps) == [0, 1]


# The log.


@pytest.mark.parametrize("torn", [1, 10, 1000])
def test_torn_tail_of_a_kill_is_left_as_it_is(torn: int, session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 4)
    (file,) = run_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-torn])
    last = int(load(tmp_path).steps[-1])
    run = session.watched(tmp_path, 3)
    assert file.read_bytes() == whole[:-torn]
    assert list(run.steps) == list(range(last + 4))
    assert run.meta["resumed"] == [last + 1]
    assert [part for part in run.meta["left_out"] if file.name in part]
    expected = [*session.reference.steps[: last + 1], *session.reference.steps[4:]]
    assert_equal(run.parameters, expected)


def test_run_that_was_killed_in_its_header_is_begun_anew(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 1)
    (file,) = run_files(tmp_path)
    file.write_bytes(file.read_bytes()[:60])
    run = session.watched(tmp_path, 2)
    assert list(run.steps) == [0, 1]
    assert run.meta["resumed"] == []


def test_session_that_was_killed_in_its_beginning_is_left_out(
    session: Session, tmp_path: Path
) -> None:
    session.watched(tmp_path, 2)
    session.watched(tmp_path, 0)
    first, second = run_files(tmp_path)
    second.write_bytes(second.read_bytes()[:60])
    assert list(load(tmp_path).steps) == [0, 1]
    run = session.watched(tmp_path, 2)
    assert list(run.steps) == [0, 1, 2, 3]
    assert run.meta["resumed"] == [2]
    (left_out,) = run.meta["left_out"]
    assert second.name in left_out
    assert first.name not in left_out


def test_entities_lost_to_damage_shift_no_names(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 2)
    (file,) = run_files(tmp_path)
    grown = Session(nn.Sequential(*session.model.children(), nn.Linear(5, 5)))
    grown.watched(tmp_path, 1)
    # The names of the first six columns; those of the seventh and eighth are in another file.
    content = bytearray(file.read_bytes())
    content[content.index(b'"4.bias"')] ^= 1
    file.write_bytes(content)
    assert load(tmp_path).parameters.names == ("5.weight", "5.bias")
    run = grown.watched(tmp_path, 3)
    names = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    assert run.parameters.names == ("5.weight", "5.bias", *names)
    for step, numbers in zip((2, 3, 4, 5), grown.reference.steps, strict=True):
        for column, name in enumerate(run.parameters.names):
            for quantity in ("grad_norm", "grad_mean", "grad_absmax", "update_norm"):
                found = run.parameters[quantity][step, column]
                # Of the step before the damage was found the names are gone.
                wanted = np.nan if step == 2 and name in names else numbers[name][quantity]
                np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert np.isnan(run.parameters["grad_norm"][:2]).all()
    assert set(run.modules.names) == {*"012345", "(root)"}


def test_clock_that_is_behind_does_not_change_the_order(session: Session, tmp_path: Path) -> None:
    session.watched(tmp_path, 2)
    (file,) = run_files(tmp_path)
    second = file.name.removeprefix(schema.FILE_PREFIX).partition(".")[0]
    ahead = file.with_name(file.name.replace(second, str(int(second) + 5000)))
    file.rename(ahead)
    run = session.watched(tmp_path, 2)
    assert list(run.steps) == [0, 1, 2, 3]
    assert run_files(tmp_path)[0] == ahead


def test_numbered_records_go_on_in_their_sequence(session: Session, tmp_path: Path) -> None:
    """TensorBoard drops what does not increase."""
    from tensorboard.compat.proto import event_pb2

    session.watched(tmp_path, 2)
    session.watched(tmp_path, 2)
    session.watched(tmp_path, 2)
    numbers = [
        event.step
        for path in run_files(tmp_path)
        for record in framing.records(io.BytesIO(path.read_bytes()), framing.Leftover())
        for event in [event_pb2.Event.FromString(record)]
        for value in event.summary.value
        if value.tag in schema.NUMBERED
    ]
    assert numbers == list(range(1, len(numbers) + 1))


def test_other_quantities_are_refused(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.watched(tmp_path, 2)
    monkeypatch.setattr("gradscope.log.reader.known_quantities", dict)
    with pytest.raises(LogError, match=r"other quantities.*new run beside it"):
        watch(session.model, log_dir=tmp_path, resume=True)
