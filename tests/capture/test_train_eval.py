"""In which mode dropouts and batch norms ran, and the running statistics of the latter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.capture.scope import watch
from gradscope.log.reader import load
from gradscope.record import Run
from tests.capture.trainings import sgd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout2d(0.25)
        self.layer = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.free(self.norm(self.first(x))))
        out: torch.Tensor = self.head(self.layer(x.mean((2, 3))))
        return out


def column(run: Run, quantity: str, name: str) -> list[float]:
    found: list[float] = run.modules[quantity][:, run.modules.names.index(name)].tolist()
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_modes_and_running_statistics(parts: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    norms = []
    with watch(model, optimizer, log_dir=tmp_path, every=1):
        for step in range(3):
            model.train(step != 1)
            model.norm.train(step == 0)
            running = [b.double() for name, b in model.norm.named_buffers() if "running" in name]
            norms.append(float(torch.cat(running).norm()))
            for _ in range(parts):
                model(torch.randn(5, 2, 6, 6) * 3).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                # Evaluation is part of no step.
                model(torch.randn(5, 2, 6, 6))
    run = load(tmp_path)
    assert run.meta["dropout"] == {"drop": 0.25, "head.0": 0.5}
    for name in ("drop", "head.0", "free"):
        assert column(run, "training", name) == [1, 0, 1]
    assert column(run, "training", "norm") == [1, 0, 0]
    # It changes in the first step, where the norm was in training mode.
    assert norms[0] != norms[1] == norms[2]
    assert column(run, "buffer_norm", "norm") == pytest.approx(norms, rel=1e-5)
    for name in ("free", "drop", "layer", "first"):
        assert np.isnan(column(run, "buffer_norm", name)).all()
    for name in ("layer", "first", "head.1"):
        assert np.isnan(column(run, "training", name)).all()


def test_mode_that_changes_within_a_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for training in (True, True, False, False):
            model.drop.train(training)
            model(torch.randn(5, 2, 6, 6)).mean().backward()
        optimizer.step()
        run = scope.run()
    # The share of its forwards.
    assert column(run, "training", "drop") == [0.5]
    assert column(run, "training", "head.0") == [1]


def test_model_without_dropout_has_none(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with watch(model, sgd(model), log_dir=tmp_path):
        pass
    assert load(tmp_path).meta["dropout"] == {}
