"""Findings told while training goes on: what, when, on which thread, at what cost."""

import gc
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from gradscope.analysis import analyzer
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report
from gradscope.capture.live import News
from gradscope.capture.scope import Scope
from gradscope.errors import GradscopeWarning
from gradscope.log import reader
from tests.capture.telling import (
    ERROR,
    NAN,
    GetJudge,
    Judge,
    always,
    every_step,
    finding,
    finish_analysis,
    train,
    watched,
    weights,
)
from tests.capture.test_bad_input import hooks_of
from tests.capture.trainings import mlp_model, vectors


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


def test_told_on_the_training_thread_between_two_steps(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    judged = judge({2: [finding()], 3: [finding()], 4: [finding()]})
    model = mlp_model()
    told: list[tuple[Finding, str, int]] = []
    at = SimpleNamespace(step=0)

    def tell(found: Finding) -> None:
        told.append((found, threading.current_thread().name, at.step))

    def after(number: int) -> None:
        at.step = number + 1
        analysis_clock.seconds += 10.0

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


@pytest.mark.usefixtures("analysis_clock")
def test_at_the_end_the_rest_is_told(judge: GetJudge) -> None:
    judge({0: [finding()]})
    model = mlp_model()
    told: list[Finding] = []
    with watched(model, on_finding=told.append) as scope:
        train(model, 3)
        assert told == []
    assert told == [finding()]
    scope.close()
    assert told == [finding()]


def test_training_does_not_change(analysis_clock: SimpleNamespace, judge: GetJudge) -> None:
    torch.manual_seed(0)
    bare = mlp_model()
    train(bare, 6)
    judge({number: [finding(), NAN] for number in range(9)})
    torch.manual_seed(0)
    model = mlp_model()
    with watched(model, on_finding=lambda _: None):
        train(model, 6, every_step(analysis_clock))
    assert all(map(torch.equal, weights(model), weights(bare)))


def test_what_the_function_raises_is_said_once_and_training_goes_on(
    analysis_clock: SimpleNamespace, judge: GetJudge
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
        train(model, 6, every_step(analysis_clock))
    assert [f.layer for f in told] == ["2", "0", "2"]
    assert len(said) == 1
    # The report has them all.
    problems = scope.run().meta["problems"]
    assert [problem["part"] for problem in problems] == ["on_finding"] * 3
    assert scope.run().recorded_steps.tolist() == list(range(6))


def test_the_function_may_run_the_model_and_close_the_watch(
    analysis_clock: SimpleNamespace, judge: GetJudge
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
    train(model, 6, every_step(analysis_clock))
    assert told == ["GS503"]
    assert hooks_of(model) == before
    assert scopes[0].run().recorded_steps.tolist() == [0, 1, 2]


# What it costs.


def analyzed_at(
    analysis_clock: SimpleNamespace,
    judged: Judge,
    steps: int,
    seconds_per_step: float,
) -> Sequence[int]:
    """The steps that were the latest to be analyzed, but for the end."""
    model = mlp_model()

    def pass_by(_: int) -> None:
        analysis_clock.seconds += seconds_per_step

    with watched(model, on_finding=lambda _: None):
        train(model, steps, pass_by)
    return [int(run.recorded_steps[-1]) for run in judged.runs[:-1]]


def test_at_first_what_nobody_notices_is_spent_ever_more_rarely(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    analysis_clock.cost = 0.045
    # At 4, 8, 16 and 32 recorded steps; a fifth would be more than 0.2 s.
    assert analyzed_at(analysis_clock, judge({}), 80, 0.0) == [3, 7, 15, 31]


def test_then_a_percent_of_the_time(analysis_clock: SimpleNamespace, judge: GetJudge) -> None:
    analysis_clock.cost = 1.0
    # The first is expected to take 0.05 s: 1 % of five seconds. The others take one, that is 1 %
    # of a hundred seconds, and are begun when so much has gone by for the next as well.
    assert analyzed_at(analysis_clock, judge({}), 45, 10.0) == [0, 19, 29, 39]


def test_of_a_budget_half_and_it_is_charged(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    analysis_clock.cost = 1.0
    model = mlp_model()
    judged = judge({})
    with watched(model, every=None, budget=0.02, on_finding=lambda _: None) as scope:

        def pass_by(_: int) -> None:
            analysis_clock.seconds += 25.0

        before = scope._observer._handover.seconds()
        train(model, 10, pass_by)
        charged = scope._observer._handover.seconds() - before
    # At 1 % of 25 seconds a step: one at once, then one in four steps; what the last took is not
    # known before the next record.
    assert [int(run.recorded_steps[-1]) for run in judged.runs[:-1]] == [0, 7]
    assert 2.0 <= charged < 2.5


def test_of_a_long_run_a_part_is_judged(
    analysis_clock: SimpleNamespace, judge: GetJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST", 20_000)
    judged = judge({})
    analyzed_at(analysis_clock, judged, 60, 1.0)
    assert len(judged.runs[-1].recorded_steps) < 40
    assert judged.runs[-1].recorded_steps[-1] == 59


def test_an_analysis_that_fails_is_switched_off_and_said_once(
    analysis_clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
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
        train(model, 6, every_step(analysis_clock))
    assert len(said) == 1
    assert scope.run().recorded_steps.tolist() == list(range(6))


def test_a_scope_that_is_dropped_leaves_no_thread(
    analysis_clock: SimpleNamespace, judge: GetJudge
) -> None:
    judge({0: [NAN]})
    told: list[Finding] = []
    model = mlp_model()
    scope = watched(model, on_finding=told.append)
    train(model, 3, every_step(analysis_clock))
    finish_analysis()
    del scope, model
    gc.collect()
    # Only what can't go away is told at once; nothing is when nobody trains.
    assert told == [NAN]
    assert "gradscope-live" not in {thread.name for thread in threading.enumerate()}
