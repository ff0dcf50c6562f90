"""Under a loss scale the numbers are those of the loss itself, and skipped steps are known."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.analysis.analyzer import analyze
from gradscope.capture.scope import Scope, watch
from tests.capture.trainings import mlp_model, vectors
from tests.setups.received import Arrived, Received, assert_describes
from tests.setups.support import support

# Not a power of two: dividing by it rounds.
SCALE = 1000.0

Spoil = Callable[[int, nn.Module], None]


def nothing(number: int, model: nn.Module) -> None:
    del number, model


def overflow_at(*steps: int) -> Spoil:
    """An infinite entry in the first weight's gradient, as when a scaled one overflows."""

    def spoil(number: int, model: nn.Module) -> None:
        first = next(model.parameters())
        if number in steps and first.grad is not None:
            first.grad[0, 0] = math.inf

    return spoil


def make_scaler(**options: Any) -> GradScaler:
    return GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 10_000, **options})


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return mlp_model()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    steps: int,
    *,
    spoil: Spoil = nothing,
    scope: Scope | None = None,
    micro_batches: int = 1,
) -> list[float]:
    """The scale that held at each step."""
    scales = []
    for number in range(steps):
        torch.manual_seed(1000 + number)
        optimizer.zero_grad()
        for _ in range(micro_batches):
            x, y = vectors()
            loss = F.cross_entropy(model(x), y)
            scaled: Tensor = scaler.scale(loss)
            scales.append(scaler.get_scale())
            scaled.backward()
        spoil(number, model)
        scaler.step(optimizer)
        scaler.update()
        if scope is not None:
            scope.log(loss=loss)
    return scales[::micro_batches]


def fused_adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, fused=True)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: Adam(model.parameters(), lr=0.01),
    "fused sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "fused adam": lambda model: Adam(model.parameters(), lr=0.01, fused=True),
    "fused adamw": fused_adamw,
}


# Gradients under a loss scale.


@support("Precision", "`GradScaler`, also with fused optimizers", parameters="right")
@pytest.mark.parametrize("given", [True, False], ids=["scaler given", "scaler not given"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_gradients_are_those_that_the_optimizer_uses(
    name: str, given: bool, tmp_path: Path
) -> None:
    model, scaler = make_model(), make_scaler(growth_interval=1)
    optimizer = OPTIMIZERS[name](model)
    received = Received(model, optimizer)
    with watch(
        model, optimizer, log_dir=tmp_path, every=1, scaler=scaler if given else None
    ) as scope:
        train(model, optimizer, scaler, 3, micro_batches=2)
        run = scope.run()
    assert len(received.steps) == 3
    # The scale doubles from step to step; gradients of this net are below one.
    assert max(np.abs(g).max() for g in received.steps[2].values()) < 1
    for row, gradients in enumerate(received.steps):
        assert len(gradients) == 6
        for parameter, gradient in gradients.items():
            assert_describes(run.parameters, "grad_", row, parameter, gradient)
    assert (run.parameters["update_norm"] > 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_and_magnitudes_are_those_of_an_unscaled_training(
    name: str, tmp_path: Path
) -> None:
    # A power of two, so that scaled and unscaled training are the same to rounding.
    runs = []
    for enabled in (True, False):
        model, scaler = make_model(), make_scaler(init_scale=1024.0, enabled=enabled)
        optimizer = OPTIMIZERS[name](model)
        folder = tmp_path / str(enabled)
        with watch(model, optimizer, log_dir=folder, every=1, scaler=scaler) as scope:
            train(model, optimizer, scaler, 3)
            runs.append(scope.run())
    scaled, plain = runs
    for quantity in ("update_norm", "update_ratio", "update_gradient_cosine"):
        np.testing.assert_allclose(
            scaled.parameters[quantity], plain.parameters[quantity], rtol=1e-4
        )
    for parameter in plain.histograms.names:
        counted = plain.histograms[parameter]
        assert counted.sum() > 0
        # An entry next to a border may fall to its other side.
        moved = np.abs(scaled.histograms[parameter].astype(int) - counted).sum()
        assert moved <= 0.02 * counted.sum()


@support("Precision", "`GradScaler` given to `watch(scaler=)`", output_gradients="right")
def test_output_gradients_are_divided_by_the_scale_of_their_backward(tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler(growth_interval=1)
    arrived = Arrived(model)
    optimizer = fused_adamw(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        expected = []
        for _ in range(3):
            (scale,) = train(model, optimizer, scaler, 1)
            expected.append({name: g / scale for name, g in arrived.gradients.items()})
        run = scope.run()
    # The scale was another one at each of them.
    assert list(run.scalars["loss_scale"]) == [SCALE, 2 * SCALE, 4 * SCALE]
    for row, gradients in enumerate(expected):
        assert len(gradients) == 6
        for name, gradient in gradients.items():
            assert_describes(run.modules, "output_grad_", row, name, gradient)
    assert "scale" not in str(run.meta["problems"])


@support("Precision", "`GradScaler`, also with fused optimizers", output_gradients="labelled")
@pytest.mark.parametrize("name", ["sgd", "fused sgd"])
def test_output_gradients_without_the_scaler_say_that_they_are_scaled(
    name: str, tmp_path: Path
) -> None:
    model, scaler = make_model(), make_scaler()
    optimizer = OPTIMIZERS[name](model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        train(model, optimizer, scaler, 1)
        run = scope.run()
    (problem,) = (p for p in run.meta["problems"] if p["part"] == "output gradients")
    assert "scaler=" in problem["message"]


def test_output_gradients_under_another_scaler_say_that_they_are_scaled(tmp_path: Path) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=make_scaler()) as scope:
        train(model, optimizer, make_scaler(), 1)
        run = scope.run()
    assert "output gradients are multiplied" in str(run.meta["problems"])


def test_scaler_that_is_switched_off_changes_nothing(tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler(enabled=False)
    optimizer = SGD(model.parameters(), 0.1)
    received = Received(model, optimizer)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        train(model, optimizer, scaler, 2)
        run = scope.run()
    assert_describes(run.parameters, "grad_", 1, "0.weight", received.steps[1]["0.weight"])
    assert "loss_scale" not in run.scalars
    assert "skipped" not in run.scalars


class OldFused(Optimizer):
    """Takes the scaler itself, as fused optimizers did before torch 2.0."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scaler: GradScaler) -> None:  # type: ignore[override]
        del closure
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad / grad_scaler.get_scale())


@support(
    "Precision",
    "`GradScaler` with an optimizer that unscales by itself (`step(grad_scaler=)`)",
    parameters="unknown",
)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
@pytest.mark.filterwarnings("ignore:gradscope:gradscope.errors.GradscopeWarning")
def test_optimizer_that_takes_the_scaler_is_left_out_and_said(tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler()
    optimizer = OldFused(model.parameters(), {})
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        x, y = vectors()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        run = scope.run()
    assert np.isnan(run.parameters["grad_norm"]).all()
    assert "OldFused.step takes the GradScaler" in str(run.meta["problems"])


# The scale and the skipped steps, at every step.


@pytest.mark.parametrize("name", ["sgd", "fused adam"])
def test_scale_and_skipped_steps_are_known_of_every_step(name: str, tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler(growth_interval=3)
    optimizer = OPTIMIZERS[name](model)
    with watch(model, optimizer, log_dir=tmp_path, every=4, scaler=scaler) as scope:
        scales = train(model, optimizer, scaler, 9, spoil=overflow_at(1, 4, 5, 8), scope=scope)
        run = scope.run()
    assert list(run.steps) == list(range(9))
    assert list(run.scalars["loss_scale"]) == scales
    assert len(set(scales)) > 2
    assert list(run.scalars["skipped"]) == [0, 1, 0, 0, 1, 1, 0, 0, 1]
    assert np.isfinite(run.scalars["loss"]).all()
    # What was skipped was not given to the optimizer.
    assert (run.scalars["nonfinite"] == 0).all()
    # The last recorded step was skipped; what was seen before it still counts.
    assert run.meta["coverage"]["parameters"] == {"expected": 6, "seen": 6}


@support(
    "Precision",
    "steps that a `GradScaler` skips",
    parameters="right",
    outputs="right",
    note="no gradient, no update; `skipped` is 1",
)
@pytest.mark.parametrize("name", ["sgd", "fused adam"])
def test_skipped_step_has_outputs_but_neither_gradients_nor_updates(
    name: str, tmp_path: Path
) -> None:
    model, scaler = make_model(), make_scaler()
    optimizer = OPTIMIZERS[name](model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        train(model, optimizer, scaler, 3, spoil=overflow_at(1), scope=scope)
        run = scope.run()
    for quantity in ("grad_norm", "grad_mean", "grad_absmax", "update_norm", "update_ratio"):
        measured = ~np.isnan(run.parameters[quantity])
        assert measured[[0, 2]].all()
        assert not measured[1].any()
    assert (run.modules["output_rms"] > 0).all()
    assert (run.modules["output_grad_norm"] > 0).all()
    counts = dict(zip(run.histograms.steps, map(run.histograms.at, range(3)), strict=False))
    assert counts[0].sum() > 0
    assert 1 not in counts or counts[1].sum() == 0
    if name == "fused adam":
        # Its kernel is handed the gradients: what overflowed is counted, and where.
        broken = dict(zip(run.parameters.names, run.parameters["grad_nonfinite"][1], strict=True))
        assert broken.pop("0.weight") == 1
        assert set(broken.values()) == {0}
    seen = run.meta["coverage"]["parameters"]
    assert seen["seen"] == seen["expected"] == 6


@pytest.mark.parametrize("name", ["sgd", "fused adam"])
def test_skipped_steps_are_no_finding_and_the_same_ones_unscaled_are(
    name: str, tmp_path: Path
) -> None:
    found = []
    for enabled in (True, False):
        model, scaler = make_model(), make_scaler(enabled=enabled)
        optimizer = OPTIMIZERS[name](model)
        folder = tmp_path / str(enabled)
        with watch(model, optimizer, log_dir=folder, every=1, scaler=scaler) as scope:
            train(model, optimizer, scaler, 12, spoil=overflow_at(0, 1, 7), scope=scope)
            found.append({finding.code for finding in scope.report().findings})
    assert not {"GS001", "GS501", "GS503"} & found[0]
    assert "GS503" in found[1]


@pytest.mark.parametrize("name", ["sgd", "fused adam"])
def test_run_of_nothing_but_skipped_steps_says_so(name: str, tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler()
    optimizer = OPTIMIZERS[name](model)
    # Nobody says which optimizer it is, and it never gets to step.
    with watch(model, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        train(model, optimizer, scaler, 4, spoil=overflow_at(0, 1, 2, 3), scope=scope)
        run = scope.run()
    assert list(run.scalars["skipped"]) == [1, 1, 1, 1]
    (finding,) = (f for f in analyze(run).findings if f.code == "GS001")
    assert "skipped all of the 4 recorded steps" in finding.message


def test_step_of_two_optimizers_is_skipped_if_one_is(tmp_path: Path) -> None:
    model, scaler = make_model(), make_scaler()
    layers = [list(layer.parameters()) for layer in model.children() if list(layer.parameters())]
    optimizers = [SGD(layers[0], 0.1), SGD([*layers[1], *layers[2]], 0.1)]
    with watch(model, optimizers, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        for number in range(3):
            x, y = vectors()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            overflow_at(1)(number, model)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        run = scope.run()
    assert list(run.scalars["skipped"]) == [0, 1, 0]
    norms = dict(zip(run.parameters.names, run.parameters["grad_norm"].T, strict=True))
    assert list(np.isnan(norms["0.weight"])) == [False, True, False]
    assert not np.isnan(norms["2.weight"]).any()


def test_one_update_of_the_scale_for_two_steps_skips_none(tmp_path: Path) -> None:
    # As GANs do: each network steps after a forward of its own, then the scale is updated.
    model, scaler = make_model(), make_scaler()
    layers = [list(layer.parameters()) for layer in model.children() if list(layer.parameters())]
    optimizers = [SGD(layers[0], 0.1), SGD([*layers[1], *layers[2]], 0.1)]
    with watch(model, optimizers, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        for _ in range(2):
            for optimizer in optimizers:
                x, y = vectors()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                model.zero_grad()
            scaler.update()
        run = scope.run()
    assert list(run.scalars["skipped"]) == [0, 0, 0, 0]


# What watching must not do.


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is taken to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sgd", "fused adamw"])
def test_training_is_the_same_bit_for_bit_and_reads_no_value_more(
    name: str, tmp_path: Path
) -> None:
    reads, weights, scales = [], [], []
    for watched in (True, False):
        model, scaler = make_model(), make_scaler(growth_interval=2)
        optimizer = OPTIMIZERS[name](model)
        scope = None
        if watched:
            scope = watch(model, optimizer, log_dir=tmp_path, every=2, scaler=scaler)
        with Reads() as mode:
            scales.append(train(model, optimizer, scaler, 6, spoil=overflow_at(1, 4)))
        reads.append(mode.count)
        if scope is not None:
            scope.close()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        # Nothing was planted on it.
        assert vars(scaler).keys() == vars(make_scaler()).keys()
        pickle.dumps(scaler)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert scales[0] == scales[1]
    assert reads[0] == reads[1] > 0
