"""Dead units and saturated outputs: shares that need more than one batch, or the layer's kind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Table

BATCH = 64
# 256 samples of 64.
KNOWN_AFTER = 4


def kill(layer: nn.Linear | nn.Conv2d, units: list[int]) -> None:
    """After a ReLU these units are zero whatever comes in."""
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.fill_(0.1)
        layer.bias[units] = -1e6


def trained(
    model: nn.Module, batches: list[Tensor], log_dir: Path, *, every: int = 1, micro: int = 1
) -> Table:
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=log_dir, every=every) as scope:
        for batch in batches:
            optimizer.zero_grad()
            for part in batch.chunk(micro):
                model(part).sum().backward()
            optimizer.step()
        return scope.run().modules


def column(table: Table, quantity: str, name: str) -> list[float]:
    return [float(value) for value in table[quantity][:, table.names.index(name)]]


@pytest.fixture
def vectors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, 6) for _ in range(6)]


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    kill(layer, [0, 3, 7])
    return model


def test_share_of_dead_units_is_known_after_256_samples(
    mlp: nn.Sequential, vectors: list[Tensor], tmp_path: Path
) -> None:
    dead = column(trained(mlp, vectors, tmp_path), "dead_unit_fraction", "1")
    assert np.isnan(dead[: KNOWN_AFTER - 1]).all()
    assert dead[KNOWN_AFTER - 1 :] == pytest.approx([0.3] * 3)


def test_only_recorded_samples_count(
    mlp: nn.Sequential, vectors: list[Tensor], tmp_path: Path
) -> None:
    # 12 steps, every third recorded: 4 records hold 256 samples.
    dead = column(trained(mlp, vectors * 2, tmp_path, every=3), "dead_unit_fraction", "1")
    assert len(dead) == 4
    assert np.isnan(dead[:3]).all()
    assert dead[3] == pytest.approx(0.3)


def test_micro_batches_count_with_their_samples(
    mlp: nn.Sequential, vectors: list[Tensor], tmp_path: Path
) -> None:
    dead = column(trained(mlp, vectors, tmp_path, micro=4), "dead_unit_fraction", "1")
    assert np.isnan(dead[: KNOWN_AFTER - 1]).all()
    assert dead[KNOWN_AFTER - 1] == pytest.approx(0.3)


def test_unit_that_fires_once_is_alive_until_256_samples_later(
    mlp: nn.Sequential, tmp_path: Path
) -> None:
    layer = mlp[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        # Unit 3 fires where feature 0 is 1; the others know nothing of it.
        layer.weight[:, 0] = 0.0
        layer.weight[3, 0] = 1e7
    torch.manual_seed(1)
    batches = [torch.randn(BATCH, 6) for _ in range(8)]
    for number, batch in enumerate(batches):
        batch[:, 0] = 0.0
        if number == 2:
            batch[-1, 0] = 1.0
    dead = column(trained(mlp, batches, tmp_path), "dead_unit_fraction", "1")
    assert np.isnan(dead[:3]).all()
    # It fired in the last sample of step 2: for 256 samples more until step 6.
    assert dead[3:] == pytest.approx([0.2, 0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_units_of_convolutions_are_channels(inplace: bool, normed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    norm = nn.BatchNorm2d(8)
    layers: list[nn.Module] = [conv, norm] if normed else [conv]
    model = nn.Sequential(*layers, nn.ReLU(inplace=inplace), nn.MaxPool2d(2))
    if normed:
        with torch.no_grad():
            norm.weight[[1, 5]] = 0.0
            norm.bias[[1, 5]] = -1.0
    else:
        kill(conv, [1, 5])
    table = trained(model, [torch.randn(BATCH, 3, 6, 6) for _ in range(4)], tmp_path)
    for name in (str(len(layers)), str(len(layers) + 1)):
        assert column(table, "dead_unit_fraction", name)[-1] == pytest.approx(2 / 8)


def test_units_of_a_sequence_are_the_last_dimension(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 10)
    kill(layer, [2])
    model = nn.Sequential(layer, nn.ReLU())
    table = trained(model, [torch.randn(BATCH, 5, 6) for _ in range(4)], tmp_path)
    assert column(table, "dead_unit_fraction", "1")[-1] == pytest.approx(0.1)


def test_linear_behind_a_convolution_has_its_own_units(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 10)
    kill(layer, [2, 4])
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), layer, nn.ReLU())
    table = trained(model, [torch.randn(BATCH, 3, 4, 4) for _ in range(4)], tmp_path)
    assert column(table, "dead_unit_fraction", "3")[-1] == pytest.approx(0.2)


def test_each_use_of_a_module_has_its_own_units(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 10)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.relu(self.second(self.relu(self.first(x))))
            return out

    torch.manual_seed(0)
    model = Twice()
    kill(model.first, [0])
    kill(model.second, [1, 2, 3, 4])
    table = trained(model, [torch.randn(BATCH, 6) for _ in range(4)], tmp_path)
    assert column(table, "dead_unit_fraction", "relu")[-1] == pytest.approx(0.1)
    assert column(table, "dead_unit_fraction", "relu#1")[-1] == pytest.approx(0.4)


SATURATING: dict[str, tuple[nn.Module, Callable[[NDArray[np.float64]], NDArray[np.bool_]]]] = {
    "tanh": (nn.Tanh(), lambda y: np.abs(y) >= 0.97),
    "sigmoid": (nn.Sigmoid(), lambda y: (y <= 0.015) | (y >= 0.985)),
    "softsign": (nn.Softsign(), lambda y: np.abs(y) >= 0.97),
    "hardtanh": (nn.Hardtanh(-2.0, 3.0), lambda y: (y <= -2) | (y >= 3)),
    "hardsigmoid": (nn.Hardsigmoid(), lambda y: (y <= 0) | (y >= 1)),
}


@pytest.mark.parametrize("kind", SATURATING)
def test_saturated_share(kind: str, tmp_path: Path) -> None:
    activation, saturates = SATURATING[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), activation)
    batch = torch.randn(BATCH, 6) * 30
    expected = saturates(model(batch).detach().numpy().astype(np.float64)).mean()
    assert 0 < expected < 1
    table = trained(model, [batch], tmp_path)
    assert column(table, "output_saturated_fraction", "1") == pytest.approx([expected])


def test_what_has_no_ends_does_not_saturate(
    mlp: nn.Sequential, vectors: list[Tensor], tmp_path: Path
) -> None:
    table = trained(mlp, vectors[:1], tmp_path)
    assert np.isnan(table["output_saturated_fraction"]).all()
