"""What rules share is computed once for a run, and goes with it."""

import gc
import weakref

import pytest

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.once import once
from gradscope.analysis.rule import UnjudgedError
from gradscope.record import Run
from tests.analysis.synthetic import Chain


def test_a_run_is_asked_once() -> None:
    asked: list[Run] = []

    @once
    def steps(run: Run) -> int:
        asked.append(run)
        return len(run.steps)

    first, second = Chain(steps=30).run(), Chain(steps=40).run()
    assert [steps(first), steps(second), steps(first), steps(second)] == [30, 40, 30, 40]
    assert asked == [first, second]


def test_what_can_t_be_judged_is_said_each_time() -> None:
    @once
    def never(run: Run) -> int:
        raise UnjudgedError(run.meta["why"])

    run = Chain(meta={"why": "nothing to judge"}).run()
    for _ in range(2):
        with pytest.raises(UnjudgedError, match="nothing to judge"):
            never(run)


def test_a_run_that_was_judged_can_go() -> None:
    run = Chain(factor=0.3, loss=(2.3, 2.3)).run()
    report = analyze(run)
    assert report.findings
    gone = weakref.ref(run)
    del run, report
    gc.collect()
    assert gone() is None
