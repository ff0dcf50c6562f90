"""What the training loop waited for is measured once, however calls are nested."""

import pytest

from gradscope.capture import guard
from gradscope.capture.guard import LOG, SCALARS, STEPS, Guard
from gradscope.errors import GradscopeWarning


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(guard, "time", made)
    return made


def test_time_in_hooks_and_in_all(clock: Clock) -> None:
    watched = Guard(lambda _: None)
    assert watched.seconds() == (0.0, 0.0)
    watched.run(STEPS, clock.wait, 2.0)
    clock.wait(10.0)
    watched.run(SCALARS, clock.wait, 1.0)
    assert watched.seconds() == (3.0, 13.0)


def test_what_runs_within_another_counts_once(clock: Clock) -> None:
    watched = Guard(lambda _: None)

    def outer() -> None:
        clock.wait(1.0)
        watched.run(SCALARS, clock.wait, 4.0)
        clock.wait(1.0)

    watched.run(STEPS, outer)
    assert watched.seconds() == (6.0, 6.0)


def test_a_failure_takes_its_time_and_does_not_stop_the_clock(clock: Clock) -> None:
    watched = Guard(lambda _: None)

    def fail() -> None:
        clock.wait(5.0)
        raise ValueError

    with pytest.warns(GradscopeWarning, match="log disabled"):
        watched.run(LOG, fail)
    watched.run(LOG, clock.wait, 7.0)
    watched.run(STEPS, clock.wait, 1.0)
    assert watched.seconds() == (6.0, 6.0)
