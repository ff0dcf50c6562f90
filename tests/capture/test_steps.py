"""What a step is, and which numbers land on it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW

from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning, UsageError
from gradscope.record import Run
from tests.capture.reference import ParameterReference, assert_equal, described
from tests.capture.trainings import lbfgs, mlp_model, sgd, vectors


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp_model()


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model)


@pytest.fixture
def scope(model: nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path) -> Iterator[Scope]:
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        yield scope


@pytest.fixture
def backward(model: nn.Module) -> Callable[[], Tensor]:
    def backward() -> Tensor:
        x, y = vectors()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return backward


Backward = Callable[[], Tensor]
Optimizer = torch.optim.Optimizer


def losses(run: Run) -> list[float]:
    return [float(value) for value in run.scalars["loss"]]


# Which steps there are.


def test_default_cadence_is_dense_then_sparse(
    model: nn.Module, optimizer: Optimizer, backward: Backward, tmp_path: Path
) -> None:
    # A budget that pays for nothing.
    with watch(model, optimizer, log_dir=tmp_path, budget=1e-9) as scope:
        for _ in range(200):
            backward()
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert list(run.steps) == list(range(200))
    assert list(run.recorded_steps)[:10] == list(range(10))
    assert 12 <= len(run.recorded_steps) < 100
    assert list(run.modules.steps) == list(run.signals.steps) == list(run.recorded_steps)


def test_every_third(
    model: nn.Module, optimizer: Optimizer, backward: Backward, tmp_path: Path
) -> None:
    with watch(model, optimizer, log_dir=tmp_path, every=3) as scope:
        for _ in range(8):
            backward()
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert list(run.recorded_steps) == [0, 3, 6]
    assert list(run.steps) == list(range(8))


def test_step_without_an_optimizer_step_stays_open(
    scope: Scope, model: nn.Module, optimizer: Optimizer
) -> None:
    """As a GradScaler does after an overflow: step() is not called."""
    x, y = vectors()
    overflowed = F.cross_entropy(model(x * 1e30), y) * float("inf")
    overflowed.backward()
    assert len(scope.run().steps) == 0
    optimizer.zero_grad()
    reference = ParameterReference(model)
    F.cross_entropy(model(x), y).backward()
    reference.before_update()
    optimizer.step()
    reference.after_update()
    run = scope.run()
    assert list(run.steps) == [0]
    assert_equal(run.parameters, reference.steps)


def test_same_optimizer_twice_is_two_steps(
    scope: Scope, model: nn.Module, optimizer: Optimizer, backward: Backward
) -> None:
    reference = ParameterReference(model)
    backward()
    for _ in range(2):
        reference.before_update()
        optimizer.step()
        reference.after_update()
    run = scope.run()
    assert list(run.steps) == [0, 1]
    assert_equal(run.parameters, reference.steps)


def test_several_forwards_and_backwards_are_one_step(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for _ in range(3):
        backward()
    optimizer.step()
    run = scope.run()
    assert list(run.steps) == [0]
    assert run.meta["coverage"]["forwards"] == 3


def test_optimizer_in_backward_is_one_step(model: nn.Module, tmp_path: Path) -> None:
    expected: list[dict[str, float]] = []
    step_in_backward(model, lambda p: expected.append(described([p.grad])))  # type: ignore[list-item]
    x, y = vectors()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            scope.log(loss=1.0)
        run = scope.run()
    assert list(run.steps) == [0, 1]
    norms = run.parameters["grad_norm"]
    assert not np.isnan(norms).any()
    # Hooks fire from the last layer to the first.
    wanted = [sorted(n["norm"] for n in expected[at : at + 6]) for at in (0, 6)]
    np.testing.assert_allclose(np.sort(norms, axis=1), wanted, rtol=1e-4)
    assert (run.parameters["in_optimizer"] == 1).all()
    assert (run.parameters["update_norm"] > 0).all()
    assert run.meta["coverage"]["optimizer_steps"] == 12


def step_in_backward(model: nn.Module, see: Callable[[nn.Parameter], None]) -> None:
    """One optimizer for each parameter, stepped as soon as the gradient is there."""
    optimizers = {parameter: SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        see(parameter)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


# Where a logged number lands.


def test_log_before_or_after_the_optimizer_lands_on_the_same_step(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for number in range(6):
        loss = backward()
        if number % 2:
            scope.log(loss=float(number), accuracy=number / 10)
        optimizer.step()
        if not number % 2:
            scope.log(loss=loss * 0 + number, accuracy=torch.tensor(number / 10))
    run = scope.run()
    assert losses(run) == list(range(6))
    np.testing.assert_allclose(run.scalars["accuracy"], np.arange(6) / 10, rtol=1e-6)


def test_several_logs_within_a_step_are_averaged(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for values in ([1.0, 3.0], [5.0], [1.0, 2.0, 6.0]):
        for value in values:
            backward()
            scope.log(loss=value)
        optimizer.step()
    assert losses(scope.run()) == [2.0, 5.0, 3.0]


def test_logs_after_run_in_mid_loop_land_on_the_step_before(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for number in range(3):
        backward()
        optimizer.step()
        scope.run()
        scope.log(loss=float(number))
    assert losses(scope.run()) == [0.0, 1.0, 2.0]


def test_logs_before_and_after_run_in_mid_loop_are_averaged(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    backward()
    scope.log(loss=1.0)
    optimizer.step()
    scope.run()
    scope.log(loss=2.0)
    scope.log(loss=6.0)
    assert losses(scope.run()) == [3.0]


def test_logs_land_on_their_step_where_the_root_is_never_called(
    scope: Scope, model: nn.Module, optimizer: Optimizer
) -> None:
    """As in `model.head(model.body(x))`: a step opens at a backward too."""
    assert isinstance(model, nn.Sequential)
    for number in range(3):
        x, y = vectors()
        for layer in model:
            x = layer(x)
        loss = F.cross_entropy(x, y)
        optimizer.zero_grad()
        loss.backward()
        scope.log(loss=float(number))
        optimizer.step()
    run = scope.run()
    assert list(run.steps) == [0, 1, 2]
    assert losses(run) == [0.0, 1.0, 2.0]


def test_what_is_no_number_is_dropped_with_a_warning(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    backward()
    with pytest.warns(GradscopeWarning, match="note.*str.*only numbers"):
        scope.log(loss=1.0, note="text")  # type: ignore[arg-type]
    with pytest.warns(GradscopeWarning, match=r"vector.*\(3,\)"):
        scope.log(vector=torch.ones(3))
    optimizer.step()
    run = scope.run()
    assert losses(run) == [1.0]
    assert "note" not in run.scalars


def test_norm_before_clipping_is_known_from_scope(
    scope: Scope, model: nn.Module, optimizer: Optimizer, backward: Backward
) -> None:
    backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    before = described(gradients)["norm"]
    returned = scope.clip_grad_norm_(before / 10)
    after = described([p.grad for p in model.parameters() if p.grad is not None])["norm"]
    optimizer.step()
    run = scope.run()
    assert float(returned) == pytest.approx(before, rel=1e-4)
    assert run.scalars["grad_norm_before_clip"][0] == pytest.approx(before, rel=1e-4)
    assert run.scalars["grad_norm"][0] == pytest.approx(after, rel=1e-4)
    assert after == pytest.approx(before / 10, rel=1e-3)


def test_global_norm_is_that_of_all_gradients(
    scope: Scope, model: nn.Module, optimizer: Optimizer, backward: Backward
) -> None:
    backward()
    expected = described([p.grad for p in model.parameters() if p.grad is not None])["norm"]
    optimizer.step()
    assert scope.run().scalars["grad_norm"][0] == pytest.approx(expected, rel=1e-4)


# The pulse.


def test_every_step_has_a_pulse_also_unrecorded(
    model: nn.Module, optimizer: Optimizer, backward: Backward, tmp_path: Path
) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    expected = []
    with watch(model, optimizer, log_dir=tmp_path, every=5) as scope:
        for _ in range(9):
            loss = backward()
            expected.append((float(loss.detach()), optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
            scope.log(loss=loss)
        run = scope.run()
    assert list(run.recorded_steps) == [0, 5]
    assert losses(run) == pytest.approx([loss for loss, _ in expected])
    np.testing.assert_allclose(run.scalars["learning_rate"], [rate for _, rate in expected])
    assert list(run.scalars["nonfinite"]) == [0.0] * 9


def test_logged_learning_rate_is_not_mixed_with_the_optimizers_own(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    backward()
    optimizer.step()
    scope.log(loss=1.0, learning_rate=0.5)
    # The optimizer used 0.1; the mean of both was never anyone's learning rate.
    assert float(scope.run().scalars["learning_rate"][0]) in {0.1, 0.5}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_nonfinite_loss_is_flagged(
    bad: float, as_tensor: bool, scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for number in range(4):
        backward()
        value = bad if number == 2 else 1.0
        scope.log(loss=torch.tensor(value) if as_tensor else value)
        optimizer.step()
    assert list(scope.run().scalars["nonfinite"]) == [0, 0, 1, 0]


def test_one_nonfinite_micro_batch_flags_the_step(
    scope: Scope, optimizer: Optimizer, backward: Backward
) -> None:
    for value in (1.0, math.nan, 1.0):
        backward()
        scope.log(loss=torch.tensor(value))
    optimizer.step()
    assert list(scope.run().scalars["nonfinite"]) == [1.0]


# Hand-written updates.


def test_scope_step_is_refused_where_an_optimizer_is_watched(scope: Scope) -> None:
    with pytest.raises(UsageError, match=r"scope\.step\(\) is for updates without an optimizer"):
        scope.step()


def test_scope_step_is_refused_once_an_optimizer_was_found(
    model: nn.Module, backward: Backward, tmp_path: Path
) -> None:
    with watch(model, log_dir=tmp_path, every=1) as scope:
        backward()
        AdamW(model.parameters()).step()
        with pytest.raises(UsageError, match="watched already"):
            scope.step()


def test_input_is_recorded_inside_a_closure_too(model: nn.Module, tmp_path: Path) -> None:
    x, y = vectors()
    optimizer = lbfgs(model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return float(loss.detach())

    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        optimizer.step(closure)
        signals = scope.run().signals
    assert "input" in signals.names
    at = signals.names.index("input")
    assert signals["rms"][0, at] == pytest.approx(described([x])["rms"], rel=1e-4)
