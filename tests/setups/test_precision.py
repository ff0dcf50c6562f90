"""Autocast, half precision and extreme values, against numpy in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Run
from gradscope.reporters.figures.magnitudes import shares_of
from tests.capture.trainings import mlp_model, vectors
from tests.setups.received import Arrived, Received, assert_describes, entries
from tests.setups.support import support

# Not a power of two: dividing by it rounds.
SCALE = 1000.0


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return mlp_model()


# Autocast and half precision.


@support(
    "Precision",
    "autocast, bfloat16 and float16",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_under_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    model, scaler = make_model(), GradScaler("cpu", init_scale=SCALE)
    arrived = Arrived(model)
    optimizer = SGD(model.parameters(), 0.1)
    received = Received(model, optimizer)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        x, y = vectors()
        with torch.autocast("cpu", dtype):
            output = model(x)
            loss = F.cross_entropy(output, y)
        assert output.dtype == dtype
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    for name, values in arrived.outputs.items():
        assert_describes(run.modules, "output_", 0, name, values)
        assert_describes(run.modules, "output_grad_", 0, name, arrived.gradients[name] / SCALE)
    for name, gradient in received.steps[0].items():
        assert_describes(run.parameters, "grad_", 0, name, gradient)


@support(
    "Precision",
    "models in bfloat16, float16 and float64",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype)
    arrived = Arrived(model)
    optimizer = SGD(model.parameters(), 0.1)
    received = Received(model, optimizer)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(2):
            x, y = vectors()
            before = {name: entries(p) for name, p in model.named_parameters()}
            F.cross_entropy(model(x.to(dtype)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        run = scope.run()
    for name, gradient in received.steps[1].items():
        assert_describes(run.parameters, "grad_", 1, name, gradient)
        column = run.parameters.names.index(name)
        norm = np.sqrt((before[name] ** 2).sum())
        change = entries(dict(model.named_parameters())[name]) - before[name]
        assert run.parameters["weight_norm"][1, column] == pytest.approx(norm, rel=1e-4)
        assert run.parameters["update_norm"][1, column] == pytest.approx(
            np.sqrt((change**2).sum()), rel=1e-4
        )
    for name, gradient in arrived.gradients.items():
        assert_describes(run.modules, "output_grad_", 1, name, gradient)


# Extremes.

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
# Entries of these sizes, as far as a dtype holds them. Squares of 1e20 and of 1e-25 are beyond
# single precision; 300² and 1e-4² beyond half.
SIZES = (1e20, 1e-25, 3e38, 1e-38, 300.0, 6e4, 1e-4, 6e-8)


def held(size: float, dtype: torch.dtype) -> bool:
    real = dtype.to_real() if dtype.is_complex else dtype
    limits = torch.finfo(real)
    return limits.smallest_normal * limits.eps <= size <= limits.max


CASES = [(dtype, size) for dtype in DTYPES for size in SIZES if held(size, dtype)]


@support(
    "Precision",
    "complex parameters; values whose squares no dtype of theirs holds",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_statistics_of_extreme_values(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_((torch.rand(30, 40, dtype=torch.float64) * size).to(dtype))
    gradient = (torch.rand(30, 40, dtype=torch.float64) - 0.2) * size
    if dtype.is_complex:
        gradient = gradient * (1 + 0.5j)
    optimizer = SGD(model.parameters(), lr=0.5)
    arrived = Arrived(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        output = model(torch.eye(40, dtype=dtype))
        output.backward(torch.full_like(output, size))
        model.weight.grad = gradient.to(dtype)
        before, given = entries(model.weight), entries(model.weight.grad)
        optimizer.step()
        run = scope.run()
    change = entries(model.weight) - before
    assert_describes(run.parameters, "grad_", 0, "weight", given)
    assert_describes(run.modules, "output_", 0, "(root)", arrived.outputs["(root)"])
    assert_describes(run.modules, "output_grad_", 0, "(root)", arrived.gradients["(root)"])
    expected = {
        "weight_norm": np.sqrt((before**2).sum()),
        "update_norm": np.sqrt((change**2).sum()),
        "update_ratio": np.sqrt((change**2).sum() / (before**2).sum()),
        "update_gradient_cosine": change
        @ given
        / np.sqrt((change**2).sum())
        / np.sqrt((given**2).sum()),
    }
    for quantity, value in expected.items():
        with np.errstate(over="ignore"):
            wanted = np.float32(value)
        assert run.parameters[quantity][0, 0] == pytest.approx(wanted, rel=1e-4), quantity
    assert run.meta["problems"] == []


@pytest.mark.parametrize("size", [1e-60, 1e-200])
def test_what_float32_cannot_hold_is_small_but_not_zero(size: float, tmp_path: Path) -> None:
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        (model(torch.ones(2, 3, dtype=torch.float64)).sum() * size).backward()
        optimizer.step()
        run = scope.run()
    # A norm of zero would say that no entry is other than zero.
    assert 0 < run.parameters["grad_norm"][0, 0] < 1e-37
    assert 0 < run.parameters["grad_absmax"][0, 0] < 1e-37
    assert run.parameters["grad_zero_fraction"][0, 0] == 0


def run_of(model: nn.Module, x: Tensor, folder: Path) -> Run:
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=folder, every=1) as scope:
        model(x).abs().sum().backward()
        optimizer.step()
        return scope.run()


def test_complex_model_with_bounded_activation_is_recorded_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = torch.complex64
    model = nn.Sequential(nn.Linear(4, 5, dtype=kind), nn.Tanh(), nn.Linear(5, 2, dtype=kind))
    run = run_of(model, torch.randn(8, 4, dtype=kind), tmp_path)
    assert run.meta["problems"] == []
    assert (run.modules["output_grad_norm"] > 0).all()
    # What saturates a complex number is not defined.
    assert np.isnan(run.modules["output_saturated_fraction"]).all()


def test_complex_parameters_weigh_as_many_numbers_as_they_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False, dtype=torch.complex64)
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.randn(8, 40, dtype=torch.complex64)).abs().sum().backward()
        assert model.weight.grad is not None
        # All of the real parts, of 2,400 real numbers.
        model.weight.grad.real.fill_(torch.nan)
        optimizer.step()
        run = scope.run()
    (entity,) = run.parameters.entities
    assert (entity.shape, entity.numel) == ((30, 40), 2400)
    assert run.parameters["grad_nonfinite"][0, 0] == 1200
    # What is not finite is in no bin: half of all.
    assert shares_of(run, [0]).bins.sum() == pytest.approx(0.5)
