"""The kernels for GPUs, on one; or, with TRITON_INTERPRET=1 where Triton is installed, as it says.

`TRITON_INTERPRET=1 python -m pytest tests/capture/test_fused.py`: what a compiler makes of them is
then not tested.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.capture import fused, statistics
from gradscope.capture.scope import watch
from tests.capture.tensors import CASES, WIDE, normal
from tests.capture.test_kernels import assert_moments, exactly, known

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and bool(importlib.util.find_spec("triton"))
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TENSORS = {
    name: tensor
    for name, tensor in (CASES | WIDE).items()
    if tensor.dtype in fused._FORMATS and tensor.numel() < 200_000
}

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="there is no CUDA device"
    ),
]


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", True)
    monkeypatch.setattr(fused, "problem", None)
    monkeypatch.setattr(fused, "_trusted", set())


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in host memory are taken for a GPU's."""
    monkeypatch.setattr(statistics, "_is_at_hand", lambda _: False)
    monkeypatch.setattr(fused, "is_on_gpu", lambda tensor: fused.usable and not tensor.is_sparse)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if INTERPRETED:
        request.getfixturevalue("played")
    return DEVICE


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_a_gpu) for name in TENSORS])
def test_moments(name: str, device: torch.device) -> None:
    (row,) = statistics.moments_of([TENSORS[name].to(device)])
    assert fused.usable
    assert_moments(row.cpu().numpy(), TENSORS[name], exact=True)


@pytest.mark.parametrize("order", [pytest.param(order, marks=on_a_gpu) for order in (1, -1)])
def test_all_formats_at_once(order: int, device: torch.device) -> None:
    some = [tensor for tensor in TENSORS.values() if tensor.numel() < 20_000][::order]
    there = [tensor.to(device) for tensor in some]
    rows, squares = statistics.moments_of(there), statistics.squares_of(there)
    assert fused.usable
    for tensor, row, square in zip(some, rows, squares, strict=True):
        assert_moments(row.cpu().numpy(), tensor, exact=True)
        expected = [exactly(known(tensor) ** 2), known(tensor).size]
        np.testing.assert_allclose(square.cpu().numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=on_a_gpu)
        for size in (1, 1023, 1024, 1025, 8191, 8192, 8193, 65_537)
    ],
)
def test_every_entry_is_read_once(size: int, device: torch.device) -> None:
    # Of a tensor in the middle of others: what is beside it is not touched.
    whole = torch.full((size + 20,), torch.nan)
    whole[7 : 7 + size] = normal(size)
    row, all_of_it = statistics.moments_of([whole.to(device)[7 : 7 + size], whole.to(device)])
    assert fused.usable
    assert_moments(row.cpu().numpy(), whole[7 : 7 + size], exact=True)
    assert_moments(all_of_it.cpu().numpy(), whole, exact=True)


@pytest.mark.parametrize("times", [pytest.param(3, marks=on_a_gpu)])
def test_same_to_the_bit(times: int, device: torch.device) -> None:
    x = normal(100_000).to(device)
    first, *others = [statistics.moments_of([x])[0] for _ in range(times)]
    assert fused.usable
    assert all(torch.equal(first, other) for other in others)


# Where it can't be used: no GPU is needed to see that.


@pytest.mark.usefixtures("played")
def test_without_triton_tensors_are_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradscope.capture.kernels", None)
    some = [normal(1000), TENSORS["not finite"], normal(10).to_sparse()]
    for tensor, row in zip(some, statistics.moments_of(some), strict=True):
        assert torch.equal(row, statistics.moments(tensor))
    assert not fused.usable
    assert fused.problem is None


@pytest.mark.usefixtures("played")
def test_a_kernel_that_is_wrong_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradscope.capture.kernels", sys)
    monkeypatch.setattr(fused, "_launch", lambda kernels, flats, rows: rows.zero_())  # noqa: ARG005
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, log_dir=tmp_path / "run", every=1) as scope:
        for _ in range(2):
            model(torch.ones(5, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = scope.run()
    np.testing.assert_allclose(run.parameters["grad_norm"], [[np.sqrt(6) * 5, np.sqrt(2) * 5]] * 2)
    (said,) = run.meta["problems"]
    assert "other moments" in str(said)
