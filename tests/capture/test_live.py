"""Findings told while training goes on: what, when, on which thread, and how training ends."""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradscope.analysis import analyzer
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.report import Report
from gradscope.capture import live
from gradscope.capture.live import News
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning, TrainingStopped
from gradscope.log import reader
from gradscope.record import Run
from tests.capture.test_bad_input import hooks_of
from tests.capture.trainings import mlp_model, sgd, vectors

# What an analysis finds, by its number.
Script = dict[int, list[Finding]]


def finding(
    code: str = "GS101", layer: str | None = "0", severity: Severity = Severity.WARNING
) -> Finding:
    return Finding(code, code.lower(), severity, layer, "…", (Evidence("x", layer, 0, 1, 1.0),))


def always(found: list[Finding]) -> Script:
    return dict.fromkeys(range(50), found)


LOSS = nn.CrossEntropyLoss()


def watched(model: nn.Module, **arguments: Any) -> Scope:
    return watch(model, criterion=LOSS, **{"every": 1, **arguments})


ERROR = finding("GS401", None, Severity.ERROR)
NAN = finding("GS503", "2", Severity.ERROR)


# What is new.


@pytest.mark.parametrize(
    ("analyses", "told"),
    [
        # Twice in a row, then never again, however it comes and goes.
        ([["a"], ["a"], ["a"], [], ["a"], ["a"]], [[], ["a"], [], [], [], []]),
        # Seen now and then it is not told.
        ([["a"], [], ["a"], []], [[], [], [], []]),
        # One code at two layers is two.
        ([["a", "b"], ["b"], ["a", "b"], ["a"]], [[], ["b"], [], ["a"]]),
    ],
)
def test_told_once_when_two_analyses_in_a_row_have_it(
    analyses: list[list[str]], told: list[list[str]]
) -> None:
    news = News(Severity.WARNING)
    found = [[f.layer for f in news.of(finding(layer=at) for at in seen)] for seen in analyses]
    assert found == told


def test_what_can_not_go_away_is_told_at_once() -> None:
    news = News(Severity.WARNING)
    passing = finding("GS503", "1", Severity.WARNING)
    assert news.of([NAN, ERROR, passing]) == [NAN]
    assert news.of([NAN, ERROR, passing]) == [ERROR, passing]


def test_the_last_analysis_tells_the_rest_but_no_information() -> None:
    news = News(Severity.WARNING)
    note = finding("GS302", severity=Severity.INFO)
    assert news.of([finding(), note], last=True) == [finding()]


# While training goes on.


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as the analyses see it: of each what it takes, and what has passed."""
    now = SimpleNamespace(seconds=0.0, cost=0.001)
    times = SimpleNamespace(monotonic=lambda: now.seconds, thread_time=lambda: now.cost)
    monkeypatch.setattr(live, "time", times)
    return now


@dataclass
class Judge:
    """Stands in for the rules: finds what is written; keeps what it was shown, and where."""

    script: Script
    runs: list[Run]
    threads: list[str]

    def __call__(self, run: Run, rules: object = None) -> Report:
        del rules
        found = self.script.get(len(self.runs), [])
        self.runs.append(run)
        self.threads.append(threading.current_thread().name)
        return Report(run, tuple(found), (), ())


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], Judge]:
    def judge(script: Script) -> Judge:
        made = Judge(script, [], [])
        monkeypatch.setattr(analyzer, "analyze", made)
        return made

    return judge


def finish_analysis() -> None:
    """Wait until none goes on."""
    for thread in threading.enumerate():
        if thread.name == "gradscope-live":
            thread.join()


def train(
    model: Callable[..., Any], steps: int, after: Callable[[int], object] = lambda _: None
) -> None:
    """Some steps, between which any analysis comes to its end."""
    assert isinstance(model, nn.Module)
    optimizer = sgd(model)
    for number in range(steps):
        torch.manual_seed(number)
        x, y = vectors()
        loss = LOSS(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish_analysis()
        after(number)


def every_step(clock: SimpleNamespace) -> Callable[[int], None]:
    """Make so much time pass in a step that each record is analyzed."""

    def pass_by(_: int) -> None:
        clock.seconds += 10.0

    return pass_by


def test_told_on_the_training_thread_between_two_steps(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judged = judge({2: [finding()], 3: [finding()], 4: [finding()]})
    model = mlp_model()
    told: list[tuple[Finding, str, int]] = []
    at = SimpleNamespace(step=0)

    def tell(found: Finding) -> None:
        told.append((found, threading.current_thread().name, at.step))

    def after(number: int) -> None:
        at.step = number + 1
        clock.seconds += 10.0

    with watched(model, on_finding=tell) as scope:
        train(model, 8, after)
        during = list(told)
    # The record of step 0 closes, and is judged, when step 1 begins; the first at which time has
    # passed. The analyses that find it are those of steps 2 and 3; step 5 is what begins next.
    assert during == [(finding(), "MainThread", 5)]
    assert told == during
    assert judged.threads == ["gradscope-live"] * 7 + ["MainThread"]
    # An analysis sees the record that is its reason, and the last one everything.
    assert [run.recorded_steps[-1] for run in judged.runs] == list(range(8))
    assert scope.run().meta["problems"] == []


@pytest.mark.usefixtures("clock")
def test_at_the_end_the_rest_is_told(judge: Callable[[Script], Judge]) -> None:
    judge({0: [finding()]})
    model = mlp_model()
    told: list[Finding] = []
    with watched(model, on_finding=told.append) as scope:
        train(model, 3)
        assert told == []
    assert told == [finding()]
    scope.close()
    assert told == [finding()]


def test_training_does_not_change(clock: SimpleNamespace, judge: Callable[[Script], Judge]) -> None:
    torch.manual_seed(0)
    bare = mlp_model()
    train(bare, 6)
    judge({number: [finding(), NAN] for number in range(9)})
    torch.manual_seed(0)
    model = mlp_model()
    with watched(model, on_finding=lambda _: None):
        train(model, 6, every_step(clock))
    assert all(map(torch.equal, weights(model), weights(bare)))


def test_what_the_function_raises_is_said_once_and_training_goes_on(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge(always([finding(layer="0"), finding(layer="2"), NAN]))
    told: list[Finding] = []

    def tell(found: Finding) -> None:
        told.append(found)
        message = f"no connection for {found.layer}"
        raise OSError(message)

    model = mlp_model()
    words = "on_finding failed at GS503.*no connection"
    with (
        pytest.warns(GradscopeWarning, match=words) as said,
        watched(model, on_finding=tell) as scope,
    ):
        train(model, 6, every_step(clock))
    assert [f.layer for f in told] == ["2", "0", "2"]
    assert len(said) == 1
    # The report has them all.
    problems = scope.run().meta["problems"]
    assert [problem["part"] for problem in problems] == ["on_finding"] * 3
    assert scope.run().recorded_steps.tolist() == list(range(6))


def test_the_function_may_run_the_model_and_close_the_watch(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge({1: [NAN, finding()]})
    model = mlp_model()
    before = hooks_of(model)
    scopes: list[Scope] = []
    told: list[str] = []

    def tell(found: Finding) -> None:
        told.append(found.code)
        # With gradients: another step, were it not the user's function that runs it.
        model(vectors()[0]).sum()
        scopes[0].close()

    scopes.append(watched(model, on_finding=tell))
    train(model, 6, every_step(clock))
    assert told == ["GS503"]
    assert hooks_of(model) == before
    assert scopes[0].run().recorded_steps.tolist() == [0, 1, 2]


# How training ends.


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_stop_ends_training_before_the_next_step(
    clock: SimpleNamespace, judge: Callable[[Script], Judge], tmp_path: Path
) -> None:
    judge({1: [finding(), ERROR], 2: [finding(), ERROR], 3: [finding(), ERROR]})
    model = mlp_model()
    after: list[list[Tensor]] = []

    def note(_: int) -> None:
        clock.seconds += 10.0
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
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge(always([NAN]))
    model = mlp_model()
    with watched(model, on_finding="stop") as scope:
        with pytest.raises(TrainingStopped):
            train(model, 9, every_step(clock))
        done = scope.run().recorded_steps.size
        train(model, 3, every_step(clock))
    assert scope.run().recorded_steps.size == done + 3


def test_at_the_end_there_is_nothing_to_stop(judge: Callable[[Script], Judge]) -> None:
    judge({0: [NAN]})
    model = mlp_model()
    with watched(model, on_finding="stop") as scope:
        train(model, 2)
    assert scope.is_closed


def test_the_users_function_may_stop_training(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge(always([finding(), NAN]))

    def tell(found: Finding) -> None:
        if found.code == "GS101":
            raise TrainingStopped((found,))

    model = mlp_model()
    with pytest.raises(TrainingStopped, match="GS101"), watched(model, on_finding=tell):
        train(model, 9, every_step(clock))


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
    loop: Loop, clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    # What stops it comes to light at a moment within a step; it waits for the step to end.
    judge(always([NAN]))
    model = mlp_model()
    done: list[int] = []

    def run_loop() -> None:
        for number in loop(model, SGD(model.parameters(), 0.1)):
            clock.seconds += 10.0
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


def test_a_compiled_model_is_stopped_too(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge(always([NAN]))
    model = mlp_model()
    compiled = torch.compile(model, backend="aot_eager")
    with watched(model, on_finding="stop"), pytest.raises(TrainingStopped):
        train(compiled, 9, every_step(clock))


# What it costs.


def analyzed_at(
    clock: SimpleNamespace,
    judged: Judge,
    steps: int,
    seconds_per_step: float,
) -> Sequence[int]:
    """The steps that were the latest to be analyzed, but for the end."""
    model = mlp_model()

    def pass_by(_: int) -> None:
        clock.seconds += seconds_per_step

    with watched(model, on_finding=lambda _: None):
        train(model, steps, pass_by)
    return [int(run.recorded_steps[-1]) for run in judged.runs[:-1]]


def test_at_first_what_nobody_notices_is_spent_ever_more_rarely(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    clock.cost = 0.045
    # At 4, 8, 16 and 32 recorded steps; a fifth would be more than 0.2 s.
    assert analyzed_at(clock, judge({}), 80, 0.0) == [3, 7, 15, 31]


def test_then_a_percent_of_the_time(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    clock.cost = 1.0
    # The first is expected to take 0.05 s: 1 % of five seconds. The others take one, that is 1 %
    # of a hundred seconds, and are begun when so much has gone by for the next as well.
    assert analyzed_at(clock, judge({}), 45, 10.0) == [0, 19, 29, 39]


def test_of_a_budget_half_and_it_is_charged(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    clock.cost = 1.0
    model = mlp_model()
    judged = judge({})
    with watched(model, every=None, budget=0.02, on_finding=lambda _: None) as scope:

        def pass_by(_: int) -> None:
            clock.seconds += 25.0

        before = scope._observer._handover.seconds()
        train(model, 10, pass_by)
        charged = scope._observer._handover.seconds() - before
    # At 1 % of 25 seconds a step: one at once, then one in four steps; what the last took is not
    # known before the next record.
    assert [int(run.recorded_steps[-1]) for run in judged.runs[:-1]] == [0, 7]
    assert 2.0 <= charged < 2.5


def test_of_a_long_run_a_part_is_judged(
    clock: SimpleNamespace, judge: Callable[[Script], Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST", 20_000)
    judged = judge({})
    analyzed_at(clock, judged, 60, 1.0)
    assert len(judged.runs[-1].recorded_steps) < 40
    assert judged.runs[-1].recorded_steps[-1] == 59


def test_an_analysis_that_fails_is_switched_off_and_said_once(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Report:
        raise MemoryError

    monkeypatch.setattr(analyzer, "analyze", fail)
    model = mlp_model()
    words = "findings during training disabled: MemoryError"
    with (
        pytest.warns(GradscopeWarning, match=words) as said,
        watched(model, on_finding=lambda _: None) as scope,
    ):
        train(model, 6, every_step(clock))
    assert len(said) == 1
    assert scope.run().recorded_steps.tolist() == list(range(6))


# With the rules themselves.


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


def test_a_scope_that_is_dropped_leaves_no_thread(
    clock: SimpleNamespace, judge: Callable[[Script], Judge]
) -> None:
    judge({0: [NAN]})
    told: list[Finding] = []
    model = mlp_model()
    scope = watched(model, on_finding=told.append)
    train(model, 3, every_step(clock))
    finish_analysis()
    del scope, model
    gc.collect()
    # Only what can't go away is told at once; nothing is when nobody trains.
    assert told == [NAN]
    assert "gradscope-live" not in {thread.name for thread in threading.enumerate()}
