"""Loss scaling: what is shown as the gradient is unscaled, or says that it is not."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradscope.capture.scope import Scope, watch
from gradscope.record import Run
from tests.capture.reference import assert_equal, recomputed
from tests.capture.trainings import mlp_model, plain, sgd, vectors

SCALE = 1024.0


def scaled_loop(
    model: nn.Module, optimizer: Optimizer, scope: Scope, factors: Sequence[float]
) -> Run:
    """A step per factor of the loss; an infinite one makes the scaler skip the optimizer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10_000)
    for number, factor in enumerate(factors):
        torch.manual_seed(1000 + number)
        x, y = vectors()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scope.log(loss=loss)
    return scope.run()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp_model()


def test_parameter_gradients_are_unscaled(model: nn.Module, tmp_path: Path) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        run = scaled_loop(model, optimizer, scope, [1.0, 1.0, 1.0])
    # A power of two: the unscaled training is the same to rounding.
    unscaled = recomputed(lambda: plain(mlp_model(), vectors), 3)
    quantities = [q for q in run.parameters.quantities if q not in {"grad_mean", "grad_std"}]
    assert_equal(run.parameters, unscaled, rtol=1e-3, quantities=quantities)


def test_skipped_step_stays_open_and_its_overflow_is_flagged(
    model: nn.Module, tmp_path: Path
) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        run = scaled_loop(model, optimizer, scope, [1.0, math.inf, 1.0])
    assert list(run.steps) == [0, 1]
    assert run.meta["coverage"]["optimizer_steps"] == 2
    # What the optimizer was given is finite; the overflow before it was seen in the loss.
    assert (run.parameters["grad_nonfinite"] == 0).all()
    assert list(run.scalars["nonfinite"]) == [0.0, 1.0]


def test_scaled_output_gradients_are_labelled(model: nn.Module, tmp_path: Path) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        run = scaled_loop(model, optimizer, scope, [1.0, 1.0])
    # Either they are shown unscaled, or the run says that they may be scaled.
    at = run.modules.names.index("(root)")
    unscaled = run.modules["output_grad_absmax"][0, at] <= 1.0
    said = {key: value for key, value in run.meta.items() if key != "log_dir"}
    assert unscaled or "scale" in str(said).lower()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_do_not_overflow(dtype: torch.dtype, tmp_path: Path) -> None:
    # Σ 300² over 4,096 entries leaves float16; max is 65,504.
    model = nn.Linear(64, 64, bias=False).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        (model(torch.ones(1, 64, dtype=dtype)).sum() * 0).backward()
        model.weight.grad = torch.full((64, 64), 300.0, dtype=dtype)
        optimizer.step()
        table = scope.run().parameters
    assert table["grad_norm"][0, 0] == pytest.approx(300 * 64, rel=1e-6)
    assert table["grad_mean"][0, 0] == pytest.approx(300, rel=1e-6)
    assert table["grad_nonfinite"][0, 0] == 0


def test_float64_gradients_whose_squares_overflow_are_infinite_and_cost_nothing_else(
    tmp_path: Path,
) -> None:
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-300)
    with watch(model, optimizer, log_dir=tmp_path / "run", every=1) as scope:
        for factor in (1e200, 1.0):
            (model(torch.ones(2, 3, dtype=torch.float64)).sum() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    run = scope.run()
    assert run.meta["problems"] == []
    norms = run.parameters["grad_norm"][:, 0]
    assert norms[0] == np.inf
    # Two samples of ones: a gradient of 2 for each of three weights.
    assert norms[1] == pytest.approx(2 * np.sqrt(3))
    assert run.parameters["grad_nonfinite"][:, 0].tolist() == [0, 0]


def test_what_is_nan_throughout_has_no_norm(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, log_dir=tmp_path / "run", every=1) as scope:
        for factor in (1.0, math.nan, 1.0):
            (model(torch.ones(2, 3)).sum() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    table = scope.run().parameters
    # The first step is sound, the second one's gradient is NaN, and so is the weight from then on.
    known = {
        "weight_norm": [True, True, False],
        "weight_rms": [True, True, False],
        "update_norm": [True, False, False],
        "update_ratio": [True, False, False],
        "update_gradient_cosine": [True, False, False],
    }
    for quantity, expected in known.items():
        assert (~np.isnan(table[quantity][:, 0])).tolist() == expected, quantity
    assert table["update_norm"][0, 0] == pytest.approx(0.1 * table["grad_norm"][0, 0])
