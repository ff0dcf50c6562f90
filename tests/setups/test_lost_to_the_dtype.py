"""The shares of gradients and updates that are below what the dtype holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.reference import wide


def trained(
    model: nn.Module, gradient: Tensor, folder: Path, *, rate: float
) -> tuple[Run, np.ndarray, np.ndarray]:
    """A step with this gradient; the weights before and after."""
    optimizer = SGD(model.parameters(), rate)
    with watch(model, optimizer, log_dir=folder, every=1) as scope:
        (weight,) = model.parameters()
        model(torch.ones(1, weight.shape[1], dtype=weight.dtype)).sum().backward()
        weight.grad = gradient
        before = wide(weight)
        optimizer.step()
        return scope.run(), before, wide(weight)


@pytest.mark.parametrize("size", [40, 600], ids=["small", "sampled"])
@pytest.mark.parametrize(
    ("dtype", "rate", "bounds"),
    [
        # Half of the distance between neighbours is 2**-9 of a bfloat16, 2**-25 of a float32.
        (torch.bfloat16, 1e-3, (0.6, 0.99)),
        (torch.bfloat16, 0.0, (1.0, 1.0)),
        (torch.float16, 1e-4, (0.3, 0.99)),
        (torch.float32, 1e-3, (0.0, 1e-3)),
        (torch.float64, 1e-3, (0.0, 0.0)),
    ],
)
def test_updates_that_leave_the_weight_as_it_was(
    dtype: torch.dtype, rate: float, bounds: tuple[float, float], size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(size, size, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.normal_()
    gradient = torch.randn(size, size, dtype=dtype)
    # What has no gradient has nothing to lose.
    gradient[: size // 4] = 0
    run, before, after = trained(model, gradient, tmp_path, rate=rate)
    given = wide(gradient) != 0
    share = float((before == after)[given].mean())
    assert bounds[0] <= share <= bounds[1]
    # Of the larger one 8,192 of 360,000 entries are looked at.
    error = 0.02 if size > 256 else 1e-6
    assert run.parameters["update_lost_fraction"][0, 0] == pytest.approx(share, abs=error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_below_the_normal_numbers_of_their_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal
    sizes = torch.rand(30, 40, dtype=torch.float64) * 4
    gradient = (sizes * smallest).to(dtype)
    gradient[0], gradient[1, 0] = 0, torch.nan
    model = nn.Linear(40, 30, bias=False, dtype=dtype)
    run, _, _ = trained(model, gradient, tmp_path, rate=0.1)
    entries = wide(gradient)
    entries = entries[np.isfinite(entries)]
    share = ((entries != 0) & (np.abs(entries) < smallest)).mean()
    assert 0.2 < share < 0.3
    assert run.parameters["grad_underflow_fraction"][0, 0] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_output_gradients_that_autocast_underflows(scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 40))
    optimizer = SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=scale)
    arrived: list[Tensor] = []
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        with torch.autocast("cpu", torch.float16):
            output = model(torch.randn(8, 20))
        output.register_hook(lambda gradient: arrived.append(gradient.clone()))
        loss = (output.float() * torch.randn(8, 40) * 1e-5).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        run = scope.run()
    assert arrived[0].dtype == torch.float16
    entries = np.abs(wide(arrived[0]))
    share = float(((entries > 0) & (entries < 2.0**-14)).mean())
    # What a loss scale is for.
    assert (share > 0.9) == (scale == 1)
    found = run.modules["output_grad_underflow_fraction"][0, run.modules.names.index("1")]
    assert found == pytest.approx(share, rel=1e-6)


def test_output_gradients_in_single_precision_are_not_looked_at(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), 0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        run = scope.run()
    assert np.isnan(run.modules["output_grad_underflow_fraction"]).all()
    assert (run.parameters["grad_underflow_fraction"] == 0).all()


def test_ten_million_entries_are_summed_to_six_digits(tmp_path: Path) -> None:
    # `torch.dot` and `norm` in float32 are off by 1e-3 here.
    torch.manual_seed(0)
    model = nn.Linear(10_000, 1_000, bias=False)
    gradient = torch.randn(1_000, 10_000) * 1e-3 + 2e-3
    run, before, _ = trained(model, gradient, tmp_path, rate=0.1)
    entries, found = wide(gradient), run.parameters
    expected = {
        "grad_norm": np.sqrt((entries**2).sum()),
        "grad_rms": np.sqrt((entries**2).mean()),
        "grad_mean": entries.mean(),
        "grad_std": entries.std(),
        "grad_absmax": np.abs(entries).max(),
        "weight_norm": np.sqrt((before**2).sum()),
    }
    for quantity, value in expected.items():
        assert found[quantity][0, 0] == pytest.approx(value, rel=1e-6), quantity
