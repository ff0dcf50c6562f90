"""What a cell holds, against autograd by hand and theory's exact cases."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.measure import Setting, fit, measured
from gradscope.comparison.result import Cell, Name
from gradscope.comparison.sites import Sites, find_sites


def _cell(model: nn.Module, x: Tensor, activation: str | None = None) -> Cell:
    def loss(net: nn.Module) -> Tensor:
        made: Tensor = net(x).square().mean()
        return made

    sites = find_sites(model, lambda: loss(model))
    chosen = None if activation is None else ACTIVATIONS[activation]
    return measured(Name("own"), 0, model, loss, Setting(sites, chosen, None, len(x)))


def _stack(depth: int, width: int, scale: float, activation: nn.Module) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
        layers += [layer, activation]
    return nn.Sequential(*layers, nn.Linear(width, width))


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_orthogonal_layers_of_tiny_inputs_grow_by_their_scale(scale: float) -> None:
    # tanh is linear near 0, so each layer's gradient norm grows by the scale, exactly.
    torch.manual_seed(0)
    cell = _cell(_stack(8, 16, scale, nn.Tanh()), 1e-6 * torch.randn(4, 16))
    assert cell.slope == pytest.approx(2 * math.log(scale), abs=1e-3)
    assert cell.drift == pytest.approx(2 * math.log(scale), abs=1e-3)
    assert cell.spread < 1e-3
    assert cell.plug_in == pytest.approx(2 * math.log(scale), abs=1e-3)
    assert cell.weight_variance == pytest.approx(scale**2, rel=1e-4)
    assert cell.decades == pytest.approx(8 * math.log10(scale), abs=1e-2)
    assert cell.saturated == 0


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_orthogonal_linear_layers_are_isometric_up_to_their_scale(scale: float) -> None:
    torch.manual_seed(0)
    cell = _cell(_stack(6, 16, scale, nn.Tanh()), 1e-6 * torch.randn(32, 16))
    assert cell.conditioning == pytest.approx(1, abs=1e-3)


def test_conditioning_is_that_of_the_singular_values() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24) for _ in range(5)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Identity())], nn.Tanh())
    # From the first of five layers to the last but one.
    jacobian = torch.linalg.multi_dot([layer.weight.double() for layer in layers[3:0:-1]])
    squares = torch.linalg.svdvals(jacobian) ** 2
    expected = (squares.square().mean() / squares.mean() ** 2).item()

    def loss(net: nn.Module) -> Tensor:
        made: Tensor = net(torch.zeros(4000, 24) + 0.1).square().mean()
        return made

    cell = measured(Name("own"), 0, model, loss, Setting(Sites((), {}), None, None, 4000))
    # 4000 random vectors.
    assert cell.conditioning == pytest.approx(expected, rel=0.08)


def test_dead_and_saturated_units_are_counted() -> None:
    torch.manual_seed(0)
    first = nn.Linear(4, 8)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        first.weight[:3] = 0
        first.bias[:3] = -1
    x = torch.randn(32, 4)
    off = (first(x) <= 0).double()
    cell = _cell(model, x)
    assert cell.dead == pytest.approx(float((off.mean(dim=0) == 1).double().mean()))
    assert cell.saturated == pytest.approx(float(off.mean()))
    h = first(x).detach().double()
    tanh = _cell(model, x, "tanh")
    assert tanh.saturated == pytest.approx(float((1 - h.tanh() ** 2 < 0.01).double().mean()))
    assert tanh.dead == 0


def test_similarity_and_update_ratio_are_those_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    cell = _cell(model, x)
    hidden = torch.relu(model[0](x)).detach().double()
    unit = hidden / hidden.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    pairs = [cosines[i, j].item() for i in range(6) for j in range(6) if i != j]
    assert cell.similarity == pytest.approx(np.mean(pairs), rel=1e-5)
    ratios = [
        (p.grad.norm() / p.norm()).item()
        for p in model.parameters()
        if p.dim() > 1 and p.grad is not None
    ]
    assert cell.update_ratio == pytest.approx(np.median(ratios), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.fill_(0.01), "copies of one another"),
        (lambda w: w.fill_(math.nan), "the loss is nan"),
        (lambda w: w.zero_(), "exactly zero"),
    ],
)
def test_what_cannot_train_is_said(change: object, words: str) -> None:
    torch.manual_seed(0)
    model = _stack(4, 8, 1.0, nn.Tanh())
    assert callable(change)
    for layer in model:
        if isinstance(layer, nn.Linear):
            change(layer.weight.data)
    cell = _cell(model, torch.randn(4, 8))
    assert cell.failure is not None
    assert words in cell.failure


def test_an_honest_initialization_is_no_failure() -> None:
    torch.manual_seed(0)
    assert _cell(_stack(4, 8, 1.0, nn.Tanh()), torch.randn(4, 8)).failure is None


def test_time_is_measured_towards_the_first_step() -> None:
    torch.manual_seed(0)
    layer = nn.RNN(8, 8, batch_first=True)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.orthogonal_(parameter, 0.8 if "hh" in name else 1.0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)[0][:, -1]
            return output

    def loss(net: nn.Module) -> Tensor:
        made: Tensor = net(x).sum()
        return made

    # Small inputs keep tanh linear: per step the gradient shrinks to 0.8.
    x = 1e-6 * torch.randn(4, 20, 8)
    cell = measured(Name("own"), 0, Last(), loss, Setting(Sites((), {}), None, None, 4))
    assert cell.time_steps == 20
    assert cell.time_slope == pytest.approx(2 * math.log(0.8), abs=1e-2)
    assert cell.time_decades == pytest.approx(19 * math.log10(0.8), abs=0.1)


def test_the_line_leaves_the_ends_out() -> None:
    line = fit(np.array([50.0, 1, 2, 3, 4, -50]))
    assert line.slope == pytest.approx(1)
    assert line.spread == pytest.approx(0, abs=1e-12)
    assert math.isnan(fit(np.array([1.0, 2.0])).slope)
    assert math.isnan(fit(np.full(8, -np.inf)).slope)
