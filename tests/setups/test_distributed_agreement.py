"""Several processes record the same steps and wait for none that does not come."""

from typing import Any

import numpy as np
import pytest

from gradscope.log.reader import load
from tests.setups.agreement_scenarios import STEPS
from tests.setups.processes import Outcome, Outcomes, devices

FAILED_ELSEWHERE = "on another process the watch failed or was closed"


def results(agreements: Outcomes, size: int, device: str, name: str) -> list[Any]:
    """What each process returned; none failed."""
    found: list[Outcome] = agreements(size, device)[0][name]
    for outcome in found:
        assert not outcome.error, outcome.error
    return [outcome.result for outcome in found]


def twice(steps: Any) -> list[int]:
    """A reduction by sum and one by maximum at each."""
    return [step for step in steps for _ in range(2)]


everywhere = pytest.mark.parametrize(
    ("size", "device"), [*devices(2), *devices(4, pytest.mark.slow)]
)


@everywhere
def test_nothing_is_exchanged_at_steps_that_are_not_recorded(
    size: int, device: str, agreements: Outcomes
) -> None:
    for steps, is_equal, _ in results(agreements, size, device, "each_step_once"):
        assert steps == twice([0, 5, 10])
        assert is_equal


@everywhere
def test_the_largest_proposal_is_the_next_step_of_all(
    size: int, device: str, agreements: Outcomes
) -> None:
    found = results(agreements, size, device, "own_clocks_and_losses")
    steps = found[0][0]
    proposed = [proposals for _, _, proposals in found]
    assert any(len({mine[step] for mine in proposed}) > 1 for step in steps)
    for others, is_equal, _ in found:
        assert others == steps
        assert is_equal
    for step, following in zip(steps[::2], steps[2::2], strict=False):
        assert following == max(mine[step] for mine in proposed)
    run = load(agreements(size, device)[1] / "own_clocks_and_losses")
    assert list(run.recorded_steps) == steps[::2]


@everywhere
def test_one_process_alone_may_ask_for_the_report(
    size: int, device: str, agreements: Outcomes
) -> None:
    found = results(agreements, size, device, "first_asks_alone")
    for steps, is_equal, _ in found:
        assert steps == twice(range(STEPS))
        assert is_equal
    # The step that has just ended is in the run already.
    assert found[0][2] == list(range(1, STEPS + 1))
    run = load(agreements(size, device)[1] / "first_asks_alone")
    assert list(run.recorded_steps) == list(range(STEPS))
    assert not run.meta["coverage"]["unfinished_step"]


@everywhere
@pytest.mark.parametrize(("name", "leaver"), [("first_closes_alone", 0), ("last_closes_alone", -1)])
def test_where_one_closes_all_end_at_the_next_recorded_step(
    name: str, leaver: int, size: int, device: str, agreements: Outcomes
) -> None:
    found = results(agreements, size, device, name)
    for rank, (steps, is_equal, problems) in enumerate(found):
        assert steps == twice([0, 2, 4, 6])
        assert is_equal
        assert any(FAILED_ELSEWHERE in said for said in problems) == (rank != leaver % size)
    run = load(agreements(size, device)[1] / name)
    assert list(run.recorded_steps)[:3] == [0, 2, 4]
    assert np.isfinite(run.parameters["grad_norm"][2]).sum() == 7


@everywhere
def test_hooks_of_closed_watches_are_gone_after_the_next_recorded_step(
    size: int, device: str, agreements: Outcomes
) -> None:
    for steps, is_equal, left in results(agreements, size, device, "all_close"):
        assert steps == twice([0, 2, 4, 6])
        assert is_equal
        assert left == 0
    assert all(not outcome.warned for outcome in agreements(size, device)[0]["all_close"])


@everywhere
@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("statistics_fail_on_the_last", -1),
        ("statistics_fail_on_the_first", 0),
        ("merging_fails_on_the_last", -1),
        ("proposing_fails_on_the_last", -1),
    ],
)
def test_where_one_fails_training_goes_on_and_all_say_why(
    name: str, failing: int, size: int, device: str, agreements: Outcomes
) -> None:
    for rank, (steps, is_equal, problems, norms) in enumerate(
        results(agreements, size, device, name)
    ):
        assert steps == twice(range(4))
        assert is_equal
        wanted = "out of luck" if rank == failing % size else FAILED_ELSEWHERE
        assert [wanted in said for said in problems] == [True]
        # What lacks a process's part is not known.
        assert np.isnan(np.array(norms[3:])).all()


@everywhere
def test_histograms_that_fail_on_one_end_on_all(
    size: int, device: str, agreements: Outcomes
) -> None:
    for steps, is_equal, problems, _ in results(
        agreements, size, device, "histograms_fail_on_the_last"
    ):
        assert steps == twice(range(STEPS))
        assert is_equal
        assert [said.startswith("histograms disabled") for said in problems] == [True]
    run = load(agreements(size, device)[1] / "histograms_fail_on_the_last")
    counted = [run.histograms.at(index).any() for index in range(len(run.histograms.steps))]
    assert counted[:3] == [True] * 3
    assert not any(counted[3:])
    assert np.isfinite(run.parameters["grad_norm"]).sum() == 7 * STEPS


@everywhere
def test_optimizers_that_take_turns_are_merged_when_the_next_forward_begins(
    size: int, device: str, agreements: Outcomes
) -> None:
    found = results(agreements, size, device, "optimizers_in_turn")
    # The last step waits for a forward that does not come.
    assert all(steps == twice(range(1, STEPS)) for steps, _ in found)
    assert found[0][1] == [True] * (STEPS - 1)


@everywhere
def test_a_resumed_run_is_agreed_on_by_processes_that_do_not_know_its_step(
    size: int, device: str, agreements: Outcomes
) -> None:
    for steps in results(agreements, size, device, "resumed"):
        assert steps == twice([0, 2, 0, 4])
    run = load(agreements(size, device)[1] / "resumed")
    assert list(run.recorded_steps) == [0, 2, 4, 8]


@everywhere
def test_a_watch_on_one_process_alone_waits_for_nobody(
    size: int, device: str, agreements: Outcomes
) -> None:
    found = results(agreements, size, device, "watched_by_one_alone")
    assert all(steps == [] and is_equal for steps, is_equal, _ in found)
    assert any("not every process calls watch()" in said for said in found[0][2])


@everywhere
def test_one_process_writes(size: int, device: str, agreements: Outcomes) -> None:
    first, *others = results(agreements, size, device, "writes_nothing_elsewhere")
    assert first["folder"]
    assert first["steps"] == 4
    assert first["reductions"] == []
    for rank, other in enumerate(others, 1):
        assert not other["folder"]
        assert other["steps"] == other["read"] == other["hooks"] == 0
        assert other["reductions"] == []
        assert other["problems"] == [f"rank 0 of {size} processes has the run; this is rank {rank}"]
        assert other["distributed"]["rank"] == rank
        # It is no fault that there is nothing here.
        assert other["found"] == []
        assert other["said"] == f"No verdict here: rank 0 of {size} processes has the report."
    assert "rank 0" not in first["said"]
