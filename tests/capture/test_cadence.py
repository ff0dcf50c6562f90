"""Which steps are recorded: exactly every k-th, or as many as a budget pays for."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from gradscope.capture import meter
from gradscope.capture.cadence import BUDGET, WINDOW, Cadence
from gradscope.capture.events import Events
from gradscope.capture.meter import Meter
from gradscope.capture.pulse import Pulse
from gradscope.capture.scope import watch


@dataclass
class Training:
    """A training that only passes time: what a step takes, and what watching adds to it."""

    step: float
    record: float
    idle: float = 0.0
    now: float = 0.0
    spent: float = 0.0
    # (when, seconds) of all costs.
    costs: list[tuple[float, float]] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    def run(self, cadence: Cadence, steps: range) -> None:
        for number in steps:
            due = cadence.due(number) or cadence.take_wanted()
            cost = self.record if due else self.idle
            self.now += self.step + cost
            self.spent += cost
            self.costs.append((self.now, cost))
            cadence.step_closed(recorded=due)
            if due:
                self.recorded.append(number)
                cadence.agree(cadence.propose(number))


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> "Run":
    return Run(monkeypatch)


@dataclass
class Run:
    """Runs such a training within a budget."""

    patch: pytest.MonkeyPatch

    def __call__(self, training: Training, steps: int, budget: float = BUDGET) -> Training:
        self.cadence(training, budget)
        training.run(self.last, range(steps))
        return training

    def cadence(
        self,
        training: Training,
        budget: float = BUDGET,
        written: Callable[[], int] = lambda: 0,
    ) -> Cadence:
        self.patch.setattr(meter, "time", training)
        self.last = Cadence(None, budget, Meter(lambda: training.spent), written)
        return self.last


TRAININGS = {
    "as dear as a step": (Training(0.030, 0.030, 0.0001), 30_000),
    "idle costs too": (Training(0.030, 0.010, 0.00025), 30_000),
    "seconds a step": (Training(2.0, 0.4), 3_000),
    "cheap beside a step": (Training(1.0, 0.02), 2_000),
    "a tiny model": (Training(0.001, 0.004), 300_000),
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_the_budget_holds_over_any_minute_but_the_first(
    name: str, budget: float, train: Run
) -> None:
    training, steps = TRAININGS[name]
    done = train(Training(training.step, training.record, training.idle), steps, budget)
    times, costs = np.array(done.costs).T
    total = np.concatenate([[0.0], np.cumsum(costs)])
    after = np.searchsorted(times, WINDOW)
    ends = np.searchsorted(times, times + WINDOW)
    windows = (total[ends] - total[: len(times)])[after:]
    # One record more may fall into a window, and those that show where training is.
    assert windows.max() <= budget * WINDOW + 2 * training.record
    assert done.spent <= budget * done.now + 10 * training.record + 0.2 + 6 * training.record
    # What may be spent is spent, as far as idling leaves anything.
    assert done.spent >= 0.8 * min(budget * done.now, training.record * steps)


def test_the_first_ten_steps_are_recorded(train: Run) -> None:
    assert train(Training(0.03, 0.03), 11).recorded[:10] == list(range(10))


def test_what_nobody_notices_is_spent_at_once(train: Run) -> None:
    done = train(Training(0.001, 0.003), 3_000)
    costs = 0.003 * len(done.recorded)
    assert 0.19 <= costs <= 0.22
    # A tenth of the way apart, give or take a quarter.
    gaps = np.diff(done.recorded)[10:-1] / np.array(done.recorded[10:-2])
    assert ((gaps < 0.16) & (gaps > 0.03)).all()


def test_however_dear_a_few_steps_show_where_training_is(train: Run) -> None:
    done = train(Training(0.001, 10.0), 20_000)
    gaps = np.array(done.recorded[10:]) / np.array(done.recorded[9:-1])
    assert len(gaps) >= 5
    assert gaps.max() <= 3.6


@pytest.mark.parametrize("size", [3_000, 28_000, 300_000])
def test_however_cheap_the_log_stays_small(size: int, train: Run) -> None:
    training = Training(0.1, 0.0005)
    cadence = train.cadence(training, written=lambda: size * len(training.recorded))
    training.run(cadence, range(300_000))
    written = size * (1 + np.arange(len(training.recorded)))
    allowed = 32_000_000 + 48 * np.array(training.recorded)
    # One more than there is room for, and a third by jitter; beyond that the few that show where
    # training is: each at three times the last one's step, until a record is made up for.
    few = max(0.0, np.log(size / 48 / (32_000_000 / size)) / np.log(3))
    assert (written <= allowed + (1 + 1 / 3 + np.ceil(few)) * size).all()
    assert written[-1] > 0.95 * min(allowed[-1], 300_000 * size)
    assert training.recorded[:100] == list(range(100))


def test_however_large_a_few_steps_show_where_training_is(train: Run) -> None:
    training = Training(0.1, 0.0005)
    cadence = train.cadence(training, written=lambda: 10**9 * len(training.recorded))
    training.run(cadence, range(20_000))
    gaps = np.array(training.recorded[10:]) / np.array(training.recorded[9:-1])
    assert len(gaps) >= 5
    assert 2 < gaps.min() <= gaps.max() <= 3.6


def test_a_run_that_is_resumed_again_and_again_stays_small(train: Run) -> None:
    training, size = Training(0.1, 0.0005), 28_000
    for session in range(10):
        before, start = len(training.recorded), session * 5_000
        cadence = train.cadence(
            training,
            written=lambda: size * (len(training.recorded) - before),  # noqa: B023  (used here)
        )
        cadence.begin_at(start, due=False, written=size * before)
        training.run(cadence, range(start, start + 5_000))
    assert size * len(training.recorded) <= 32_000_000 + 48 * 50_000 + 11 * 10 * size


def test_what_costs_less_than_the_budget_is_recorded_always(train: Run) -> None:
    assert train(Training(1.0, 0.005), 200).recorded == list(range(200))


@pytest.mark.parametrize("period", [2, 3, 6])
def test_no_optimizer_is_left_out_where_they_take_turns(period: int, train: Run) -> None:
    done = train(Training(0.03, 0.003), 30_000)
    turns = Counter(number % period for number in done.recorded)
    share = len(done.recorded) / period
    assert set(turns) == set(range(period))
    assert min(turns.values()) > 0.7 * share


def test_an_event_is_looked_at_at_once_and_again_ever_more_rarely(train: Run) -> None:
    training = Training(0.03, 0.03)
    cadence = train.cadence(training)
    training.run(cadence, range(1_000))
    before = len(training.recorded)
    for start in range(1_000, 1_400):
        cadence.alarm()
        training.run(cadence, range(start, start + 1))
    looks = training.recorded[before:]
    assert looks[:5] == [1_000, 1_001, 1_002, 1_003, 1_004]
    assert len(looks) <= 30
    assert np.diff(looks).max() > 2 * 10


def test_an_event_that_can_not_be_paid_for_is_passed_over(train: Run) -> None:
    training = Training(0.03, 1.0)
    cadence = train.cadence(training)
    training.run(cadence, range(15))
    cadence.alarm()
    assert not cadence.take_wanted()


def test_exactly_every_kth_step_whatever_happens() -> None:
    cadence = Cadence(10)
    cadence.alarm()
    assert not cadence.take_wanted()
    assert cadence.propose(10) == 20


# What is an event.


def events_of(losses: list[float], *, late: bool = False) -> list[int]:
    """The steps at which one was seen."""
    seen: list[int] = []
    now = 0

    def note() -> None:
        seen.append(now)

    events = Events(note)
    for now, loss in enumerate(losses):
        value = torch.tensor(loss, device="meta") if late else torch.tensor(loss)
        values: dict[str, list[torch.Tensor | float]] = {"loss": [value]}
        values["loss_nonfinite"] = [float(not math.isfinite(loss))]
        events.closed(Pulse(now, values))
        if late:
            events.arrived([{"loss": loss, "loss_nonfinite": float(not math.isfinite(loss))}])
    return seen


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_leaps_up_or_is_not_finite_is_an_event(late: bool) -> None:
    noise = (1 + 0.1 * np.random.default_rng(0).standard_normal(100)).tolist()
    assert events_of(noise, late=late) == []
    assert events_of([*noise, 5.0, 1.0], late=late) == [100]
    assert events_of([*noise, math.nan, 1.0, math.inf], late=late) == [100, 102]


def test_what_is_usual_is_no_event() -> None:
    # At the beginning, nothing is known to be unusual; falling is not leaping up; one that rests
    # may tremble.
    assert events_of([1.0, 50.0, 2.0]) == []
    assert events_of([10.0 / (1 + step) for step in range(100)]) == []
    assert events_of([*[0.5] * 60, 0.55]) == []
    assert events_of([2.0**step for step in range(5)]) == []


def test_a_step_without_a_loss_is_no_event() -> None:
    events = Events(lambda: pytest.fail("an event"))
    events.closed(Pulse(0))


# In a training.


def test_nan_is_recorded_densely_from_the_next_step_on(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), 0.0)
    with watch(model, optimizer, log_dir=tmp_path) as scope:
        for number in range(60):
            loss = model(torch.ones(2, 3)).sum() * (math.nan if number == 40 else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss)
        run = scope.run()
    assert {41, 42, 43, 44, 45} <= set(run.recorded_steps.tolist())
    assert run.scalars["loss_nonfinite"][40] == 1
    assert list(run.steps) == list(range(60))
