"""Layers that are replaced while an optimizer holds what was there, and the like."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam, Optimizer

import gradscope
from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.capture.scope import watch
from gradscope.quantities import CATALOGUE, PARAMETERS
from gradscope.record import Run
from tests.capture.trainings import mlp_model
from tests.setups.support import support

STEPS = 40
QUANTITY = "stale_in_optimizer"

Change = Callable[[nn.Sequential, list[Optimizer]], None]


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Six features, five classes that they tell apart."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 6, generator=generator)
    return x, x[:, :5].argmax(dim=1)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.01)


def trained(
    folder: Path,
    change: Change,
    *,
    when: int = 10,
    given: bool = False,
    make: Callable[[nn.Sequential], Optimizer] = lambda model: adam(model.parameters()),
    **options: Any,
) -> Run:
    """A training in which the model changes before a step."""
    torch.manual_seed(0)
    model = mlp_model()
    optimizers = [make(model)]
    settings = {"every": 1, "log_dir": folder, **options}
    with watch(model, optimizers if given else None, **settings) as scope:
        for number in range(STEPS):
            if number == when:
                change(model, optimizers)
            x, y = batch(number)
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            scope.log(loss=loss)
    # As anyone reads it, later.
    return gradscope.load(folder)


def head_replaced(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
    del optimizers
    model[4] = nn.Linear(8, 5)


def findings(run: Run) -> dict[str, Finding]:
    report = analyze(run)
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert run.meta["problems"] == []
    return {finding.code: finding for finding in report.findings}


def harmful(run: Run) -> list[str]:
    return [f.code for f in findings(run).values() if f.severity is not Severity.INFO]


def stale_at(run: Run, name: str) -> list[int]:
    flags = run.parameters[QUANTITY][:, run.parameters.names.index(name)]
    return [int(step) for step in run.recorded_steps[flags == 1]]


@support(
    "Optimizers",
    "one that still holds a head that was replaced",
    parameters="labelled",
    note="GS008 stale-optimizer-parameters says so",
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("when", [0, 10])
def test_head_replaced_leads_and_explains_the_new_one(
    when: int, given: bool, tmp_path: Path
) -> None:
    run = trained(tmp_path, head_replaced, when=when, given=given)
    found = findings(run)
    assert found["GS008"].severity in {Severity.WARNING, Severity.ERROR}
    assert found["GS008"].layer == "4"
    assert found["GS008"].explained_by == ()
    assert found["GS008"].span == (when, STEPS - 1)
    assert f"2 tensors that are the model's no more, since step {when}" in found["GS008"].message
    assert "(4.weight, 4.bias)" in found["GS008"].message
    assert found["GS004"].explained_by == ("GS008",)
    assert f"since step {when}" in found["GS004"].message
    assert stale_at(run, "4.weight") == list(range(when, STEPS))
    assert stale_at(run, "2.weight") == []


def test_head_of_other_names(tmp_path: Path) -> None:
    """The names of the old one are gone: its row remains."""

    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        del optimizers
        model[4] = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    run = trained(tmp_path, change)
    found = findings(run)
    assert "(4.0.weight, 4.0.bias, 4.2.weight and 1 more)" in found["GS008"].message
    assert found["GS004"].explained_by == ("GS008",)


def test_head_that_was_never_recorded(tmp_path: Path) -> None:
    """Replaced before the first step, and its names are gone."""

    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        del optimizers
        model[4] = nn.Sequential(nn.Linear(8, 5))

    run = trained(tmp_path, change, when=0)
    assert findings(run)["GS004"].explained_by == ("GS008",)
    (old,) = [entity for entity in run.parameters.entities if entity.name == "4.weight"]
    assert (old.shape, old.group, old.type) == ((5, 8), "weight", "Linear")
    assert np.isnan(run.parameters["weight_norm"][:, run.parameters.names.index("4.weight")]).all()


def assigned(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
    del optimizers
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def converted(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
    del optimizers
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@support(
    "Optimizers",
    "one all of whose parameters were replaced, by `load_state_dict(assign=True)`, say",
    parameters="labelled",
    note="GS008 stale-optimizer-parameters says so",
)
@pytest.mark.parametrize("change", [assigned, converted])
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("when", [0, 10])
def test_every_parameter_replaced(change: Change, given: bool, when: int, tmp_path: Path) -> None:
    """The optimizer holds nothing of the model any more, and still its steps are the model's."""
    run = trained(tmp_path, change, when=when, given=given)
    assert list(run.recorded_steps) == list(range(STEPS))
    found = findings(run)
    assert "6 tensors" in found["GS008"].message
    assert found["GS008"].explained_by == ()
    assert found["GS004"].explained_by == ("GS008",)
    assert ("GS001" in found) == (when == 0)
    if when == 0:
        assert found["GS001"].explained_by == ("GS008",)
        assert "no optimizer that stepped holds the parameters" in found["GS001"].message


@pytest.mark.parametrize("when", [0, 10])
@pytest.mark.parametrize("swapped", [False, True])
def test_converted_in_place_is_silent(swapped: bool, when: int, tmp_path: Path) -> None:
    """Swapping is refused by torch where somebody refers to a parameter weakly."""

    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        del optimizers
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        try:
            model.double().float()
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    run = trained(tmp_path, change, when=when)
    assert "GS008" not in findings(run)
    assert (run.parameters[QUANTITY] == 0).all()


def test_optimizer_rebuilt_is_silent(tmp_path: Path) -> None:
    kept: list[Optimizer] = []

    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        # A scheduler, say, still holds the old one.
        kept.extend(optimizers)
        model[4] = nn.Linear(8, 5)
        optimizers[:] = [adam(model.parameters())]

    run = trained(tmp_path, change)
    assert "GS008" not in findings(run)
    assert harmful(run) == []


def test_old_head_held_beside_the_new_one_is_information(tmp_path: Path) -> None:
    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        model[4] = nn.Linear(8, 5)
        optimizers[0].add_param_group({"params": list(model[4].parameters())})

    run = trained(tmp_path, change)
    assert findings(run)["GS008"].severity is Severity.INFO
    assert harmful(run) == []


def test_rebuilt_after_a_while_is_silent_in_the_end(tmp_path: Path) -> None:
    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        model[4] = nn.Linear(8, 5)
        passed = iter(range(STEPS))

        def later(*_: object) -> None:
            if next(passed) == 5:
                optimizers[:] = [adam(model.parameters())]

        model.register_forward_pre_hook(later)

    run = trained(tmp_path, change)
    assert stale_at(run, "4.weight") == list(range(10, 15))
    assert "GS008" not in findings(run)


def test_replaced_before_watching_is_not_judged(tmp_path: Path) -> None:
    """An optimizer may hold what it likes: of these tensors nothing is known."""

    def make(model: nn.Sequential) -> Optimizer:
        return adam([*model.parameters(), *nn.Linear(8, 5).parameters()])

    run = trained(tmp_path, lambda *_: None, make=make)
    assert "GS008" not in findings(run)
    assert harmful(run) == []


@pytest.mark.parametrize("watched", [0, 1])
def test_two_models_in_one_optimizer_are_silent(watched: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [mlp_model(), mlp_model()]
    optimizer = adam([p for model in models for p in model.parameters()])
    with watch(models[watched], optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(STEPS):
            x, y = batch(number)
            optimizer.zero_grad()
            loss = sum((F.cross_entropy(model(x), y) for model in models), torch.zeros(()))
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
        run = scope.run()
    assert "GS008" not in findings(run)
    assert harmful(run) == []


def test_frozen_backbone_is_silent(tmp_path: Path) -> None:
    def make(model: nn.Sequential) -> Optimizer:
        model[0].requires_grad_(False)
        return adam(model[2:].parameters())

    run = trained(tmp_path, lambda *_: None, make=make)
    assert "GS008" not in findings(run)
    assert harmful(run) == []


def test_backbone_that_rests_is_not_blamed_on_the_head(tmp_path: Path) -> None:
    """The backbone is in no optimizer; the head was replaced, and added: two things."""

    def change(model: nn.Sequential, optimizers: list[Optimizer]) -> None:
        model[4] = nn.Linear(8, 5)
        optimizers[0].add_param_group({"params": list(model[4].parameters())})

    run = trained(tmp_path, change, make=lambda model: SGD(model[4].parameters(), lr=0.1))
    found = findings(run)
    assert found["GS008"].severity is Severity.INFO
    assert found["GS004"].explained_by == ()


def test_what_is_not_watched_is_not_reported(tmp_path: Path) -> None:
    run = trained(tmp_path, head_replaced, exclude="4.*")
    assert "GS008" not in findings(run)
    assert all(not name.startswith("4.") for name in run.parameters.names)


def test_resumed_with_an_optimizer_that_fits_is_silent(tmp_path: Path) -> None:
    assert "GS008" in findings(trained(tmp_path, head_replaced))
    run = trained(tmp_path, lambda *_: None, resume=True)
    assert list(run.recorded_steps) == list(range(2 * STEPS))
    assert stale_at(run, "4.weight") == list(range(10, STEPS))
    assert "GS008" not in findings(run)


def test_run_from_before_the_quantity_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tuple(quantity for quantity in PARAMETERS if quantity.name != QUANTITY)
    monkeypatch.setitem(CATALOGUE, "parameters", known)
    trained(tmp_path, head_replaced)
    monkeypatch.undo()
    report = analyze(gradscope.load(tmp_path))
    assert [skip.code for skip in report.skipped if "stale_in_optimizer" in skip.reason] == [
        "GS008"
    ]
    assert "GS004" in {finding.code for finding in report.findings}


def test_old_parameters_are_not_kept_alive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    optimizers = [adam(model.parameters())]
    with watch(model, log_dir=tmp_path, every=1) as scope:
        old: list[weakref.ReferenceType[Tensor]] = []
        for number in range(4):
            if number == 2:
                old = [weakref.ref(p) for p in model[4].parameters()]
                model[4] = nn.Linear(8, 5)
                optimizers[:] = [adam(model.parameters())]
            x, y = batch(number)
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizers[0].step()
            scope.log(loss=loss)
        assert [reference() for reference in old] == [None, None]
