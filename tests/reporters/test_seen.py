"""How much of the model was seen is counted per recorded step, and what was missed is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam

import gradscope
from gradscope.capture.scope import watch
from gradscope.record import Run
from gradscope.reporters.json import JsonReporter
from gradscope.reporters.provenance import particulars, unseen
from tests.capture.trainings import vectors
from tests.reporters.samples import empty_run, report_of, run_of

STEPS = 6


class Branches(nn.Module):
    """A trunk, a branch that may rest, one shared activation, and a module that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.branch = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.act = nn.ReLU()
        self.spare = nn.Identity()
        self.rests = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.trunk(x))
        if not self.rests:
            hidden = self.act(hidden + self.branch(hidden))
        result: Tensor = self.head(hidden)
        return result


Change = Callable[[Branches, int], object]


def trained(
    folder: Path,
    change: Change,
    *,
    parameters: Callable[[Branches], Any] = nn.Module.parameters,
    **options: Any,
) -> Run:
    torch.manual_seed(0)
    model = Branches()
    optimizer = SGD(parameters(model), lr=0.1)
    with watch(model, optimizer, log_dir=folder, **{"every": 1, **options}) as scope:
        for number in range(STEPS):
            change(model, number)
            x, y = vectors()
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
        live = scope.run()
    run = gradscope.load(folder)
    assert said(live) == said(run)
    return run


def said(run: Run) -> tuple[str, list[str]]:
    return particulars(run).get("Seen", ""), unseen(run)


def nothing(model: Branches, number: int) -> None:
    del model, number


def resting_at(*steps: int) -> Change:
    def change(model: Branches, number: int) -> None:
        model.rests = number in steps

    return change


def test_all_was_seen(tmp_path: Path) -> None:
    seen, missed = said(trained(tmp_path, nothing))
    # The root, the trunk, the branch, the head and the activation.
    assert seen == "6 parameters and 5 modules in every recorded step"
    # What never runs is listed apart.
    assert missed == ["modules that never ran: spare"]


def test_the_step_in_which_the_least_was_seen(tmp_path: Path) -> None:
    seen, missed = said(trained(tmp_path, resting_at(3, 4)))
    assert seen == "4 of 6 parameters, 4 of 5 modules at step 3"
    assert missed == [
        "2 of 6 parameters at step 3 (branch.weight, branch.bias), because no gradient arrived",
        "1 of 5 modules at step 3 (branch), because nothing ran there",
        "modules that never ran: spare",
    ]


def test_what_ran_later_than_the_first_step_is_not_missed_in_it(tmp_path: Path) -> None:
    seen, missed = said(trained(tmp_path, resting_at(0)))
    assert seen == "4 of 6 parameters, 4 of 4 modules at step 0"
    assert len(missed) == 2
    assert missed[0].startswith("2 of 6 parameters at step 0 (branch.weight, branch.bias), because")


def test_what_did_not_run_in_the_last_step_did_run(tmp_path: Path) -> None:
    _, missed = said(trained(tmp_path, resting_at(STEPS - 1)))
    assert missed[-1] == "modules that never ran: spare"


def test_parameters_that_no_optimizer_holds(tmp_path: Path) -> None:
    run = trained(tmp_path, nothing, parameters=lambda model: model.head.parameters())
    seen, missed = said(run)
    assert seen == "2 of 6 parameters, 5 of 5 modules in every recorded step"
    assert missed[0] == (
        "4 of 6 parameters in every recorded step (trunk.weight, trunk.bias, branch.weight, "
        "branch.bias), because no optimizer in charge was seen"
    )


def test_optimizers_that_take_turns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branches()
    optimizers = [SGD(model.trunk.parameters(), lr=0.1), SGD(model.head.parameters(), lr=0.1)]
    model.branch.requires_grad_(False)
    with watch(model, optimizers, log_dir=tmp_path, every=1) as scope:
        for number in range(4):
            x, y = vectors()
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[number % 2].step()
        run = scope.run()
    seen, missed = said(run)
    assert seen == "2 of 4 parameters, 5 of 5 modules at step 0"
    assert "(head.weight, head.bias), because the optimizer in charge did not step" in missed[0]


class Pair(nn.Module):
    """A network and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 5)


def in_turn(folder: Path, steps: int, every: int) -> Run:
    """Stepped in turn; the loop calls the parts, never the model."""
    torch.manual_seed(0)
    model = Pair()
    optimizers = [SGD(model.net.parameters(), lr=0.1), Adam(model.critic.parameters())]
    with watch(model, optimizers, log_dir=folder, every=every) as scope:
        for number in range(steps):
            x, y = vectors()
            model.zero_grad()
            F.cross_entropy(model.critic(model.net(x)), y).backward()
            optimizers[number % 2].step()
        return scope.run()


def test_containers_whose_parts_are_called_are_no_gap(tmp_path: Path) -> None:
    run = in_turn(tmp_path, 6, 1)
    assert run.meta["coverage"]["modules"]["never_ran"] == ["(root)"]
    assert not [told for told in unseen(run) if "never ran" in told]


@pytest.mark.parametrize(
    ("every", "steps", "told"), [(2, 12, "0 of its 6"), (10, 300, "0 of its 150")]
)
def test_an_optimizer_whose_turns_are_not_recorded_is_named(
    every: int, steps: int, told: str, tmp_path: Path
) -> None:
    (gap,) = (said for said in unseen(in_turn(tmp_path, steps, every)) if "optimizer 2" in said)
    assert gap.startswith(f"optimizer 2 (Adam): {told}")
    assert "every=1" in gap


@pytest.mark.parametrize("every", [1, 3])
def test_optimizers_that_are_all_recorded_are_no_gap(every: int, tmp_path: Path) -> None:
    run = in_turn(tmp_path, 24, every)
    assert [o["steps"] for o in run.meta["coverage"]["optimizers"]] == [12, 12]
    recorded = [o["recorded_steps"] for o in run.meta["coverage"]["optimizers"]]
    assert recorded == [12 // every, 12 // every]
    assert not [said for said in unseen(run) if "optimizer 2" in said]


def test_frozen_parameters_are_not_expected(tmp_path: Path) -> None:
    def freeze(model: Branches, number: int) -> None:
        model.trunk.requires_grad_(number < 2)

    seen, _ = said(trained(tmp_path, freeze))
    assert seen == "6 parameters and 5 modules in every recorded step"


def test_no_modules_where_none_are_recorded(tmp_path: Path) -> None:
    seen, missed = said(trained(tmp_path, nothing, level="parameters"))
    assert seen == "6 parameters in every recorded step"
    assert missed == ['updates and module outputs: the run was recorded with level="parameters"']


def test_it_is_the_whole_runs_after_resuming(tmp_path: Path) -> None:
    trained(tmp_path, resting_at(2))
    seen, missed = said(trained(tmp_path, nothing, resume=True))
    assert seen == "4 of 6 parameters, 4 of 5 modules at step 2"
    assert len(missed) == 3


@pytest.fixture
def branch_rests(tmp_path: Path) -> Run:
    return trained(tmp_path, resting_at(3))


def with_reasons(run: Run, reasons: dict[str, str]) -> Run:
    modules = {**run.meta["coverage"]["modules"], "reasons": reasons}
    return replace(run, meta={**run.meta, "coverage": {**run.meta["coverage"], "modules": modules}})


def test_reasons_that_capture_knows(branch_rests: Run) -> None:
    reasons = {"branch": "it is compiled", "spare": "it is scripted", "head": "it is scripted"}
    _, missed = said(with_reasons(branch_rests, reasons))
    assert missed[1:] == [
        "1 of 5 modules at step 3 (branch), because it is compiled",
        "the outputs, or their gradients, of spare, head, because it is scripted",
    ]


def test_json_has_the_names(branch_rests: Run) -> None:
    document = json.loads(JsonReporter().render(report_of(branch_rests)))
    assert document["run"]["seen"] == {
        "step": 3,
        "always": False,
        "parameters": {
            "expected": 6,
            "seen": 4,
            "unseen": {
                "branch.weight": "no gradient arrived",
                "branch.bias": "no gradient arrived",
            },
        },
        "modules": {"expected": 5, "seen": 4, "unseen": {"branch": "nothing ran there"}},
    }


@pytest.mark.parametrize("coverage", [None, [], {"modules": None}, {"modules": []}])
def test_log_without_what_capture_noted(coverage: object) -> None:
    run = run_of([[1.0, 2.0]], meta={"coverage": coverage})
    assert said(run) == ("2 parameters in every recorded step", [])


def test_nothing_recorded() -> None:
    assert said(empty_run()) == ("", [])
    document = json.loads(JsonReporter().render(report_of(empty_run())))
    assert document["run"]["seen"] is None
