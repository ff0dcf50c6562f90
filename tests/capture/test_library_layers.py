"""Layers as model libraries write them: what kind they are, which way their units run, how deep."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Run


class Conv1D(nn.Module):
    """As in transformers' GPT-2: a linear layer, its weight transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class SiLUActivation(nn.Module):
    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class LayerNorm2d(nn.LayerNorm):
    """As in timm: over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RmsNorm2dFp32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt()


def one_step(model: nn.Module, x: Tensor, folder: Path) -> Run:
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=folder, every=1) as scope:
        model(x).square().mean().backward()
        optimizer.step()
        return scope.run()


def test_kinds_of_layers(tmp_path: Path) -> None:
    model = nn.Sequential(Conv1D(6, 8), SiLUActivation(), nn.RMSNorm(8), nn.Linear(8, 2))
    run = one_step(model, torch.randn(4, 6), tmp_path)
    kinds = {entity.name: entity.group for entity in run.modules.entities}
    assert kinds == {
        "0": "linear",
        "1": "activation",
        "2": "norm",
        "3": "linear",
        "(root)": "container",
    }


@pytest.mark.parametrize("norm", [LayerNorm2d(4), RmsNorm2dFp32(), nn.BatchNorm2d(4)])
def test_units_behind_norms_of_images_are_channels(norm: nn.Module, tmp_path: Path) -> None:
    class Dying(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([0.0, 1, 1, 1]).view(1, 4, 1, 1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, Dying())
    table = one_step(model, torch.randn(300, 3, 5, 5), tmp_path).modules
    found = table["dead_unit_fraction"][0, table.names.index("2")]
    # Each column of the images has entries other than zero, one channel has none.
    assert found == pytest.approx(0.25)


def test_a_shared_weight_is_as_deep_as_its_first_use(tmp_path: Path) -> None:
    class Tied(nn.Module):
        """As T5: the module that is named first never runs."""

        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(9, 6)
            self.body = nn.Linear(6, 6)
            self.encoder = nn.ModuleDict({"words": nn.Embedding(9, 6)})
            self.encoder["words"].weight = self.shared.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(self.encoder["words"](x))
            return out

    run = one_step(Tied(), torch.arange(9), tmp_path)
    assert run.parameters.names == ("shared.weight", "body.weight", "body.bias")
