"""Initializations: closed forms, pairing, what is data-dependent, and the code to paste."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.activation import ACTIVATIONS, activation_called
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import (
    COMPARED,
    INITIALIZATIONS,
    Initialization,
    Initialized,
    initialization_called,
    initialize,
)
from gradscope.errors import ConfigError, ConfigTypeError

WIDTH = 128


def mlp(layers: int = 3) -> Any:
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def initialized(
    model: nn.Module,
    wanted: str | Callable[[nn.Module], object],
    activation: str = "relu",
    seed: int = 0,
    forward: Callable[[], object] = lambda: None,
) -> Initialized:
    return initialize(
        model, initialization_called(wanted), ACTIVATIONS[activation], Draws(seed), forward
    )


def _mean_square(activation: str) -> float:
    """E φ(z)², independently: by scipy."""
    function = ACTIVATIONS[activation]

    def integrand(z: float) -> float:
        phi = float(function(torch.tensor(z, dtype=torch.float64)))
        return phi**2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return float(integrate.quad(integrand, -12, 12, points=(0.0,))[0])


# Weights' variance times fan_in, and that of biases, of a square layer.
VARIANCES: dict[tuple[str, str], tuple[float, float]] = {
    ("torch_default", "relu"): (1 / 3, 1 / 3 / WIDTH),
    ("xavier_uniform", "tanh"): (1.0, 0.0),
    ("xavier_normal", "gelu"): (1.0, 0.0),
    ("kaiming_uniform", "tanh"): (2.0, 0.0),
    ("kaiming_normal", "gelu"): (2.0, 0.0),
    ("kaiming_uniform_fan_out", "relu"): (2.0, 0.0),
    ("kaiming_normal_fan_out", "relu"): (2.0, 0.0),
    ("lecun_normal", "relu"): (1.0, 0.0),
    ("orthogonal", "relu"): (2.0, 0.0),
    ("delta_orthogonal", "relu"): (2.0, 0.0),
    ("orthogonal", "silu"): (1 / _mean_square("silu"), 0.0),
    ("matched", "tanh"): (1 / _mean_square("tanh"), 0.0),
    ("matched", "sigmoid"): (1 / _mean_square("sigmoid"), 0.0),
    ("critical", "relu"): (2.0, 0.0),
    ("critical", "tanh"): (1.0, 0.0),
    ("critical", "gelu"): (1.98305826, 0.17292239),
    ("normal_1", "relu"): (float(WIDTH), 0.0),
    ("normal_0.01", "relu"): (WIDTH * 1e-4, 0.0),
}


@pytest.mark.parametrize(("name", "activation"), VARIANCES)
def test_variances(name: str, activation: str) -> None:
    """49152 weights: a variance is known to √(2 / 49152) = 0.64 %; 384 biases: to 7.2 %."""
    model = mlp()
    result = initialized(model, name, activation)
    assert set(result.changed) == dict(model.named_parameters()).keys()
    assert not result.left
    layers = [module for module in model if isinstance(module, nn.Linear)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    biases = torch.cat([layer.bias.detach() for layer in layers])
    expected, of_biases = VARIANCES[name, activation]
    assert float(weights.square().mean()) * WIDTH == pytest.approx(expected, rel=0.026)
    assert float(biases.square().mean()) == pytest.approx(of_biases, rel=0.29)


def test_the_distributions_have_their_shape() -> None:
    model = mlp(1)
    initialized(model, "kaiming_uniform")
    bound = math.sqrt(6 / WIDTH)
    assert bound * 0.999 < float(model[0].weight.detach().abs().max()) <= bound
    initialized(model, "kaiming_normal")
    kurtosis = float((model[0].weight.detach() / math.sqrt(2 / WIDTH)).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=4 * math.sqrt(96 / WIDTH**2))
    initialized(model, "constant")
    assert model[0].weight.detach().unique().tolist() == pytest.approx([0.01])


def test_configurations_are_paired() -> None:
    one, other = mlp(), mlp()
    initialized(one, "kaiming_normal", seed=5)
    initialized(other, "xavier_normal", seed=5)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs * math.sqrt(2), rtol=1e-6, atol=0)
    uniform = mlp()
    initialized(uniform, "kaiming_uniform", seed=5)
    ranks = [model[0].weight.detach().flatten().argsort(stable=True) for model in (one, uniform)]
    # Where the tail of the distribution function rounds to the same number, ranks may change.
    assert float((ranks[0] == ranks[1]).double().mean()) > 0.99
    before = copy.deepcopy(one)
    initialized(one, "kaiming_normal", seed=6)
    assert not torch.equal(one[0].weight, before[0].weight)


def test_own_changes_nothing_and_says_so() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    result = initialized(model, "own")
    assert result.changed == ()
    assert set(result.left) == before.keys()
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


@pytest.mark.parametrize("name", [*INITIALIZATIONS, "custom"])
def test_no_random_state_moves_and_nothing_else_changes(name: str) -> None:
    inputs = torch.randn(16, WIDTH)
    block = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.5, batch_first=True)
    model = nn.Sequential(block, nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    model[1].eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    versions = [(held, held.requires_grad) for held in model.parameters()]
    state = torch.get_rng_state()
    wanted: Any = name
    if name == "custom":
        wanted = lambda model: nn.init.normal_(model[0].linear1.weight)  # noqa: E731
    initialized(model, wanted, forward=lambda: model.train()(inputs).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    for held, (was, required) in zip(model.parameters(), versions, strict=True):
        assert held is was
        assert held.requires_grad == required
        assert held.grad is None
        assert held.is_leaf
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_delta_orthogonal_keeps_the_norm_of_every_input() -> None:
    kernel: dict[str, Any] = {"padding": 1, "padding_mode": "circular", "bias": False}
    for module in (nn.Conv2d(8, 8, 3, **kernel), nn.Conv2d(8, 24, 3, groups=2, **kernel)):
        initialized(module, "delta_orthogonal", "linear")
        inputs = torch.randn(2, 8, 6, 6)
        assert torch.allclose(module(inputs).norm(), inputs.norm(), rtol=1e-5)
    patches = nn.Conv2d(3, 192, 8, stride=8, bias=False)
    initialized(patches, "delta_orthogonal", "linear")
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(patches(images).norm(), images.norm(), rtol=1e-5)


class Shared(nn.Module):
    """A layer used twice, one whose weight is another's, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, WIDTH, 3)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.twice.weight
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(inputs).mT * 3)
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        made: Tensor = self.head(self.tied(hidden))
        return made


def test_lsuv_gives_each_output_unit_variance() -> None:
    model, inputs = Shared(), 5 * torch.randn(32, 3, 10)
    result = initialized(model, "lsuv", forward=lambda: model(inputs))
    outputs: dict[str, list[float]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, __, out, name=name: outputs.setdefault(name, []).append(
                float(out.detach().var())
            )
        )
    model(inputs)
    assert outputs["stem"] == pytest.approx([1.0], abs=0.03)
    assert outputs["head"] == pytest.approx([1.0], abs=0.03)
    pooled = [*outputs["twice"], *outputs["tied"]]
    assert sum(pooled) / 3 == pytest.approx(1.0, abs=0.03)
    assert result.notes == ("tied.weight is twice.weight, and drawn once, as that",)


class Block(nn.Module):
    """Two residual branches: one that ends in a layer, one in a norm beside a projection."""

    def __init__(self, *, last: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide, self.way, self.norm = nn.Linear(8, 16), nn.Linear(8, 16), nn.LayerNorm(16)
        self.last = last

    def forward(self, inputs: Tensor) -> Tensor:
        branch = F.dropout(self.outer(F.relu(self.inner(inputs))), 0.1)
        if self.last is not None:
            made: Tensor = inputs + self.last(branch)
            return made
        hidden = inputs + branch
        return F.relu(self.way(hidden) + self.norm(self.wide(F.relu(hidden))))


class TwoWays(nn.Module):
    """A sum of two layers of the same input is one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.one(inputs) + self.other(inputs))


def test_zero_residual_zeroes_the_ends_of_branches() -> None:
    model: Any = Block()
    inputs = torch.randn(4, 8)
    result = initialized(model, "zero_residual", forward=lambda: model(inputs).sum())
    assert set(result.zeroed) == {"outer.weight", "outer.bias", "norm.weight", "norm.bias"}
    assert torch.equal(model(inputs), F.relu(model.way(inputs)))
    other = Block()
    initialized(other, "matched")
    assert torch.equal(model.inner.weight, other.inner.weight)


@pytest.mark.parametrize(
    "model",
    # Of the last, the branch's end is one from which nothing would ever be learned.
    [mlp(), nn.LSTM(WIDTH, WIDTH), TwoWays(), Block(last=nn.ReLU())],
)
def test_without_branches_there_is_a_reason(model: nn.Module) -> None:
    inputs = torch.randn(4, 8 if isinstance(model, Block | TwoWays) else WIDTH)
    before = copy.deepcopy(model.state_dict())
    result = initialized(model, "zero_residual", forward=lambda: model(inputs))
    assert "no residual branch" in (result.reason or "")
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_there_is_no_critical_point_of_sigmoid() -> None:
    model = mlp(1)
    assert INITIALIZATIONS["critical"].reason(ACTIVATIONS["sigmoid"])
    assert initialized(model, "critical", "sigmoid").reason
    for initialization in INITIALIZATIONS.values():
        assert initialization.reason(ACTIVATIONS["relu"]) is None


def test_custom_functions() -> None:
    def half(model: nn.Module) -> None:
        nn.init.normal_(model[0].weight)  # type: ignore[index]

    one, other = mlp(2), mlp(2)
    result = initialized(one, half, seed=7)
    initialized(other, half, seed=7)
    assert result.changed == ("0.weight",)
    assert result.left["2.weight"] == "half left it"
    assert torch.equal(one[0].weight, other[0].weight)

    def broken(model: nn.Module) -> None:
        raise KeyError(str(len(list(model.modules()))))

    assert "broken raised KeyError" in (initialized(one, broken).reason or "")


def test_names() -> None:
    assert initialization_called("He").name == "kaiming_normal"
    assert set(COMPARED) <= INITIALIZATIONS.keys()
    with pytest.raises(ConfigError, match="nearest name is 'xavier_normal'"):
        initialization_called("xavier_nomal")
    wrong: Any = 3
    with pytest.raises(ConfigTypeError, match="neither"):
        initialization_called(wrong)


SNIPPETS = [name for name in INITIALIZATIONS if name not in {"own", "lsuv", "zero_residual"}]


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_do_the_same(name: str) -> None:
    """Per layer, the norm of weights and biases: 1 % and less of sampling error in weights."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(200, 150), nn.Conv2d(64, 128, 3, groups=2), nn.Conv1d(96, 80, 4, stride=4)
        )

    model, ours = build(), build()
    exec(INITIALIZATIONS[name].snippet(ACTIVATIONS["gelu"]), {"model": model})  # noqa: S102
    initialized(ours, name, "gelu")
    for mine, theirs in zip(model.parameters(), ours.parameters(), strict=True):
        tolerance = 0.04 if mine.dim() > 1 else 0.3
        expected = float(theirs.detach().norm())
        assert float(mine.detach().norm()) == pytest.approx(expected, rel=tolerance)


def test_snippets_of_what_depends_on_the_model() -> None:
    model, inputs = mlp(), torch.randn(64, WIDTH) * 3
    lsuv = INITIALIZATIONS["lsuv"].snippet(ACTIVATIONS["relu"])
    exec(lsuv, {"model": model, "inputs": inputs})  # noqa: S102
    for depth in range(1, len(model), 2):
        assert float(model[:depth](inputs).detach().var()) == pytest.approx(1.0, abs=0.01)
    block = Block()
    zeroed = ("outer.weight", "norm.weight")
    exec(INITIALIZATIONS["zero_residual"].snippet(ACTIVATIONS["relu"], zeroed), {"model": block})  # noqa: S102
    assert not block.outer.weight.any()
    assert not block.norm.weight.any()
    assert block.inner.weight.any()
    custom = Initialization("mine", "", function=nn.Module.eval)
    assert custom.snippet(activation_called("relu")) == "mine(model)\n"
