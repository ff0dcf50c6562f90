"""scope.clip_grad_norm_ is torch's own, and what it did is on the record."""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW, Optimizer

from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from tests.capture.trainings import mlp_model, vectors
from tests.setups.received import NAN, Received
from tests.setups.support import support


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return mlp_model().to(dtype)


def fill(model: nn.Module, size: float) -> None:
    """Gradients of random entries of that size."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        drawn = torch.rand(parameter.shape, dtype=torch.float64) - 0.3
        parameter.grad = (drawn * size).to(parameter.dtype)


def norm_of(gradients: Sequence[np.ndarray[Any, Any]], kind: float = 2.0) -> float:
    """The norm of all entries as of one vector, in float64."""
    return float(np.linalg.norm(np.concatenate([g.reshape(-1) for g in gradients]), kind))


def arrays(model: nn.Module) -> list[np.ndarray[Any, Any]]:
    return [p.grad.double().numpy().copy() for p in model.parameters() if p.grad is not None]


def watched_step(model: nn.Module, optimizer: Optimizer, folder: Path, **clip: Any) -> Scope:
    """A scope whose first step was clipped, with the gradients that the model has."""
    scope = watch(model, optimizer, log_dir=folder, every=1)
    held = [parameter.grad for parameter in model.parameters()]
    model(torch.ones(2, 6, dtype=next(model.parameters()).dtype))
    for parameter, gradient in zip(model.parameters(), held, strict=True):
        parameter.grad = gradient
    scope.clip_grad_norm_(**clip)
    optimizer.step()
    return scope


def test_the_signature_is_torchs() -> None:
    theirs = inspect.signature(nn.utils.clip_grad_norm_).parameters
    ours = inspect.signature(Scope.clip_grad_norm_).parameters
    assert list(ours)[1:] == list(theirs)[1:]
    assert [p.default for p in ours.values()][1:] == [p.default for p in theirs.values()][1:]


@support("Clipping", "`scope.clip_grad_norm_`: as torch's, bit for bit", parameters="right")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("kind", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gradients_and_result_are_torchs_bit_for_bit(
    size: float, kind: float, foreach: bool | None, dtype: torch.dtype
) -> None:
    ours, theirs = make_model(dtype), make_model(dtype)
    fill(ours, size)
    fill(theirs, size)
    with watch(ours) as scope:
        found = scope.clip_grad_norm_(0.7, norm_type=kind, foreach=foreach)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7, kind, foreach=foreach)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_parameters_that_are_not_watched_are_clipped_too(tmp_path: Path) -> None:
    ours, theirs = make_model(), make_model()
    fill(ours, 1.0)
    fill(theirs, 1.0)
    with watch(ours, log_dir=tmp_path, include="0.*", level="parameters") as scope:
        found = scope.clip_grad_norm_(0.5)
    assert torch.equal(found, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    for one, other in zip(arrays(ours), arrays(theirs), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("kind", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("size", [100.0, 1.0, 1e-2, 1e-5])
def test_norms_before_and_after_and_whether_it_clipped(
    size: float, kind: float, tmp_path: Path
) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    fill(model, size)
    before = norm_of(arrays(model), kind)
    received = Received(model, optimizer)
    scope = watched_step(model, optimizer, tmp_path, max_norm=1.0, norm_type=kind)
    run = scope.run()
    scope.close()
    after = norm_of(list(received.steps[0].values()), kind)
    assert run.scalars["grad_norm_before_clip"][0] == pytest.approx(before, rel=1e-4)
    assert run.scalars["grad_norm_after_clip"][0] == pytest.approx(after, rel=1e-4)
    assert run.scalars["clipped"][0] == float(before > 1.0)
    # The 2-norm in the table is what is left, whatever norm was clipped by.
    left = norm_of(list(received.steps[0].values()))
    assert run.scalars["grad_norm"][0] == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_models_of_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(dtype)
    optimizer = SGD(model.parameters(), 0.1)
    fill(model, 1.0)
    before = norm_of(arrays(model))
    received = Received(model, optimizer)
    with watched_step(model, optimizer, tmp_path, max_norm=1.0) as scope:
        run = scope.run()
    # Torch computes the norm, and multiplies, in the gradients' precision.
    rounding = 4 * torch.finfo(dtype).eps
    after = norm_of(list(received.steps[0].values()))
    assert run.scalars["grad_norm_before_clip"][0] == pytest.approx(before, rel=rounding)
    assert run.scalars["grad_norm_after_clip"][0] == pytest.approx(after, rel=rounding)
    assert run.scalars["clipped"][0] == 1


def train(
    model: nn.Module, optimizer: Optimizer, scope: Scope, factors: Sequence[float], limit: float
) -> list[float]:
    """A clipped step for each factor of the loss; the norms that torch found."""
    norms = []
    for number, factor in enumerate(factors):
        torch.manual_seed(1000 + number)
        x, y = vectors()
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(model(x), y) * factor
        loss.backward()
        norms.append(float(scope.clip_grad_norm_(limit)))
        optimizer.step()
        scope.log(loss=loss / factor)
    return norms


def test_share_of_clipped_steps_is_known_also_of_steps_not_recorded(tmp_path: Path) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, log_dir=tmp_path, every=4) as scope:
        norms = train(model, optimizer, scope, [9, 1e-3, 9, 9, 1e-3, 9, 1e-3, 9], limit=1.0)
        run = scope.run()
    assert list(run.recorded_steps) == [0, 4]
    np.testing.assert_allclose(run.scalars["grad_norm_before_clip"], norms, rtol=1e-6)
    assert list(run.scalars["clipped"]) == [1, 0, 1, 1, 0, 1, 0, 1]
    assert np.nanmean(run.scalars["clipped"]) == 5 / 8


def test_steps_that_nobody_clips_have_no_flag(tmp_path: Path) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for clip in (True, False):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            if clip:
                scope.clip_grad_norm_(1e-3)
            optimizer.step()
        run = scope.run()
    np.testing.assert_array_equal(run.scalars["clipped"], [1, NAN])
    assert np.isnan(run.scalars["grad_norm_after_clip"][1])


def test_clipping_belongs_to_its_step_where_no_forward_is_seen(tmp_path: Path) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 1e-3)
    norms = []
    with watch(model, optimizer, log_dir=tmp_path, every=1, level="parameters") as scope:
        for size in (1.0, 2.0, 3.0):
            fill(model, size)
            norms.append(norm_of(arrays(model)))
            scope.clip_grad_norm_(0.1)
            optimizer.step()
        run = scope.run()
    np.testing.assert_allclose(run.scalars["grad_norm_before_clip"], norms, rtol=1e-4)


@pytest.mark.parametrize("spoilt", [math.inf, math.nan])
def test_norm_that_is_not_finite(spoilt: float, tmp_path: Path) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = SGD(ours.parameters(), 1e-3)
    for model in (ours, theirs):
        fill(model, 1.0)
        first = next(model.parameters())
        assert first.grad is not None
        first.grad[0, 0] = spoilt
    with watched_step(ours, optimizer, tmp_path, max_norm=1.0) as scope:
        run = scope.run()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    for one, other in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert run.scalars["clipped"][0] == 0
    assert np.isnan(run.scalars["grad_norm_after_clip"][0])


def test_error_that_is_asked_for_is_torchs_and_leaves_the_gradients(tmp_path: Path) -> None:
    model = make_model()
    fill(model, math.inf)
    before = arrays(model)
    refused = pytest.raises(RuntimeError, match=r"total norm of order 2\.0")
    with watch(model, log_dir=tmp_path) as scope, refused:
        scope.clip_grad_norm_(1.0, error_if_nonfinite=True)
    for one, other in zip(before, arrays(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_closed_scope_still_clips(tmp_path: Path) -> None:
    model = make_model()
    fill(model, 1.0)
    scope = watch(model, log_dir=tmp_path)
    scope.close()
    scope.clip_grad_norm_(0.1)
    assert norm_of(arrays(model)) == pytest.approx(0.1, rel=1e-4)


# Under a loss scale.


@support("Clipping", "after `scaler.unscale_`", parameters="right")
@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_gradients_are_clipped_and_recorded(fused: bool, tmp_path: Path) -> None:
    model = make_model()
    scaler = GradScaler("cpu", init_scale=1000.0)
    optimizer = AdamW(model.parameters(), 1e-3, fused=fused)
    received = Received(model, optimizer)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        x, y = vectors()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        before = norm_of(arrays(model))
        scope.clip_grad_norm_(before / 3)
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    used = norm_of(list(received.steps[0].values()))
    assert used == pytest.approx(before / 3, rel=1e-4)
    assert run.scalars["grad_norm_before_clip"][0] == pytest.approx(before, rel=1e-4)
    assert run.scalars["grad_norm_after_clip"][0] == pytest.approx(used, rel=1e-4)
    assert run.scalars["grad_norm"][0] == pytest.approx(used, rel=1e-4)
    assert run.scalars["clipped"][0] == 1
    assert "clip" not in str(run.meta["problems"])


@support("Clipping", "of gradients that are still scaled", parameters="labelled")
def test_clipping_scaled_gradients_is_said_and_their_norm_is_unscaled(tmp_path: Path) -> None:
    model = make_model()
    scaler = GradScaler("cpu", init_scale=1000.0)
    optimizer = SGD(model.parameters(), 1e-3)
    received = Received(model, optimizer)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        x, y = vectors()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaled = norm_of(arrays(model))
        with pytest.warns(GradscopeWarning, match=r"unscale_\(optimizer\)"):
            returned = scope.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    assert float(returned) == pytest.approx(scaled, rel=1e-4)
    assert run.scalars["grad_norm_before_clip"][0] == pytest.approx(scaled / 1000, rel=1e-4)
    used = norm_of(list(received.steps[0].values()))
    assert run.scalars["grad_norm_after_clip"][0] == pytest.approx(used, rel=1e-4)


def test_flags_are_not_the_users_to_log(tmp_path: Path) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        with pytest.warns(GradscopeWarning, match="clipped.*gradscope's own"):
            scope.log(clipped=3.0)
        train(model, optimizer, scope, [1e-3], limit=1.0)
        run = scope.run()
    assert list(run.scalars["clipped"]) == [0]
