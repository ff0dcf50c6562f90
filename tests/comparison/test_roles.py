"""Roles: each kind of layer's fans by a forward and a backward, what is left, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import INITIALIZATIONS, Initialized, initialize
from gradscope.comparison.roles import roles_of
from gradscope.errors import ConfigError


def initialized(model: nn.Module, name: str, seed: int = 0) -> Initialized:
    return initialize(model, INITIALIZATIONS[name], ACTIVATIONS["relu"], Draws(seed), lambda: None)


def _image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Each with an input; circular padding, so that no sum lacks terms at a border.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(300, 500), _image(64, 300)),
    "conv1d": (
        lambda: nn.Conv1d(60, 90, 5, padding=2, padding_mode="circular"),
        _image(8, 60, 32),
    ),
    "grouped": (
        lambda: nn.Conv2d(64, 128, 3, padding=1, groups=4, padding_mode="circular"),
        _image(8, 64, 12, 12),
    ),
    "depthwise": (
        lambda: nn.Conv2d(256, 256, 3, padding=1, groups=256, padding_mode="circular"),
        _image(8, 256, 12, 12),
    ),
    "conv3d": (
        lambda: nn.Conv3d(24, 32, 3, padding=1, padding_mode="circular"),
        _image(2, 24, 6, 6, 6),
    ),
    # Kernel and stride are equal: every output is reached by as many inputs.
    "transposed": (lambda: nn.ConvTranspose2d(128, 64, 2, stride=2), _image(8, 128, 8, 8)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(128, 256, 3, stride=3, groups=2),
        _image(8, 128, 24),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["lecun_normal", "kaiming_uniform"])
def test_forward_variance(kind: str, name: str) -> None:
    """Mean square of outputs over that of inputs; six standard errors of n weights at least."""
    build, inputs = LAYERS[kind]
    module = build()
    initialized(module, name)
    with torch.no_grad():
        factor = float(module(inputs).square().mean() / inputs.square().mean())
    expected = 1.0 if name == "lecun_normal" else 2.0
    assert factor == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", [k for k in LAYERS if "transposed" not in k])
def test_backward_variance(kind: str) -> None:
    build, inputs = LAYERS[kind]
    module = build()
    initialized(module, "kaiming_normal_fan_out")
    inputs = inputs.clone().requires_grad_()
    output = module(inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(output, inputs, cotangent)
    factor = float(gradient.square().mean() / cotangent.square().mean())
    assert factor == pytest.approx(2.0, rel=0.1)


def test_bilinear_sums_over_both_inputs() -> None:
    module = nn.Bilinear(40, 50, 200)
    initialized(module, "lecun_normal")
    with torch.no_grad():
        output = module(_image(200, 40), _image(200, 50) * 3)
    assert float(output.square().mean()) == pytest.approx(9.0, rel=0.1)


def test_packed_projections_are_matrices_of_their_own() -> None:
    packed: Any
    apart: Any
    packed, apart = nn.MultiheadAttention(96, 4), nn.MultiheadAttention(96, 4, kdim=32, vdim=48)
    for module in (packed, apart):
        initialized(module, "orthogonal")
    parts = [*packed.in_proj_weight.chunk(3), apart.k_proj_weight.T, apart.v_proj_weight.T]
    for part in parts:
        gram = part @ part.T / 2  # the gain of relu is √2
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5)
    initialized(packed, "xavier_normal")
    # 9216 entries each: a standard deviation is known to 0.74 %.
    for part in packed.in_proj_weight.chunk(3):
        assert float(part.detach().std()) == pytest.approx(96**-0.5, rel=0.03)


def test_gates_are_matrices_of_their_own_and_no_gain_concerns_them() -> None:
    lstm: Any = nn.LSTM(24, 48, num_layers=2, bidirectional=True, proj_size=16)
    with torch.no_grad():
        lstm.bias_ih_l0.fill_(1.0)
    result = initialized(lstm, "orthogonal")
    for gate in lstm.weight_hh_l1_reverse.chunk(4):
        assert torch.allclose(gate.T @ gate, torch.eye(16), atol=1e-5)
    assert torch.allclose(lstm.weight_hr_l0 @ lstm.weight_hr_l0.T, torch.eye(16), atol=1e-5)
    forget = torch.zeros(4, 48)
    forget[1] = 1.0
    assert torch.equal(lstm.bias_ih_l0, forget.flatten())
    assert set(result.changed) == dict(lstm.named_parameters()).keys()
    cell: Any = nn.GRUCell(24, 48)
    initialized(cell, "orthogonal")
    for gate in cell.weight_hh.chunk(3):
        assert torch.allclose(gate @ gate.T, torch.eye(48), atol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 64, padding_idx=3)
        self.places = nn.Embedding(20, 64, padding_idx=0)
        self.scale = nn.Parameter(torch.ones(()))
        self.token = nn.Parameter(torch.ones(1, 1, 64))
        self.norm = nn.LayerNorm(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(requires_grad=False)
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.words.weight


def test_tied_frozen_norms_vectors_and_unknown_modules() -> None:
    model = Tied()
    before = {name: held.detach().clone() for name, held in model.named_parameters()}
    result = initialized(model, "lecun_normal")
    assert result.changed == ("head.weight",)
    assert result.notes == ("words.weight is head.weight, and drawn once, as that",)
    # As a linear layer of 64 inputs, whose padding row stays zero.
    assert float(model.words.weight.detach().square().mean()) == pytest.approx(
        199 / 200 / 64, rel=0.06
    )
    assert not model.words.weight[3].any()
    assert set(result.left) == before.keys() - {"words.weight"}
    for name in result.left:
        assert torch.equal(model.get_parameter(name), before[name]), name
    assert result.left["frozen.weight"] == result.left["frozen.bias"] == "frozen"
    assert "none of the layers" in result.left["token"]
    assert "no fan" in result.left["places.weight"]
    initialized(model, "torch_default")
    assert float(model.places.weight[1:].detach().std()) == pytest.approx(1.0, rel=0.1)
    assert not model.places.weight[0].any()


class Conv1D(nn.Module):
    """transformers' layer of that name."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.ones(outputs))


def test_conv1d_is_transposed() -> None:
    module: Any = nn.Module()
    module.c_attn = Conv1D(3 * 80, 80)
    module.c_fc = Conv1D(320, 80)
    initialized(module, "xavier_normal")
    # Projections of 80 × 80, each known to a relative 1 / √(2 · 6400).
    assert float(module.c_attn.weight.detach().std()) == pytest.approx(80**-0.5, rel=0.04)
    assert float(module.c_fc.weight.detach().std()) == pytest.approx(200**-0.5, rel=0.04)
    assert not module.c_fc.bias.any()
    initialized(module, "kaiming_normal_fan_out")
    assert float(module.c_fc.weight.detach().std()) == pytest.approx((2 / 320) ** 0.5, rel=0.04)


def _deprecated(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with pytest.warns(FutureWarning):
            return norm(nn.Linear(64, 64))

    return build


@pytest.mark.parametrize(
    ("build", "norm"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), None),
        (_deprecated(torch.nn.utils.weight_norm), None),
        (lambda: parametrizations.spectral_norm(nn.Linear(64, 64)), 1.0),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(64, 64)), 1.0),
    ],
    ids=["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm"],
)
def test_parametrized(build: Callable[[], nn.Module], norm: float | None) -> None:
    """The weight in use is the drawn one, or that divided by its largest singular value."""
    plain, module = nn.Linear(64, 64), build()
    initialized(plain, "kaiming_normal")
    result = initialized(module, "kaiming_normal")
    assert result.changed == ("weight", "bias")
    assert not result.left
    module.eval()
    used = module(torch.eye(64)).T.detach()
    drawn = plain.weight.detach()
    if norm is not None:
        drawn = drawn / torch.linalg.matrix_norm(drawn, 2)
    assert torch.allclose(used, drawn, atol=0.02 if norm else 1e-6, rtol=0.03 if norm else 1e-5)


def test_orthogonal_parametrizations() -> None:
    """One projects what it gets, which draws for a wide matrix; one takes nothing."""
    state = torch.get_rng_state()
    module: Any = parametrizations.orthogonal(nn.Linear(32, 16))
    other: Any = parametrizations.orthogonal(nn.Linear(8, 8), use_trivialization=False)
    torch.set_rng_state(state)
    before = module.weight.detach().clone()
    assert initialized(module, "kaiming_normal").changed == ("weight", "bias")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(module.weight, before)
    assert torch.allclose(module.weight @ module.weight.T, torch.eye(16), atol=1e-5)
    result = initialized(other, "kaiming_normal")
    assert "takes no new values" in result.left["weight"]


def test_a_shared_module_is_one() -> None:
    layer = nn.Linear(8, 8)
    assert [w.name for w in roles_of(nn.Sequential(layer, nn.ReLU(), layer)).weights] == [
        "0.weight"
    ]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(4)), "run the model once"),
        (lambda: nn.Linear(3, 3, device="meta"), "meta device"),
        (
            lambda: nn.ParameterList(
                [nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)]
            ),
            "int8",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refused(build: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        initialized(build(), "kaiming_normal")


def _through_own_reset(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
            # Which leaves that of the output layer.
            nn.init.kaiming_uniform_(module.out_proj.weight, a=5**0.5)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.zeros_(module.out_proj.bias)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(40, 90),
        lambda: nn.Conv2d(16, 32, 3, groups=2),
        lambda: nn.ConvTranspose2d(16, 48, 4, stride=2, groups=4),
        lambda: nn.Bilinear(12, 30, 20),
        lambda: nn.MultiheadAttention(48, 4),
        lambda: nn.MultiheadAttention(48, 4, kdim=24, vdim=60),
        lambda: nn.LSTM(20, 30),
        lambda: nn.GRUCell(20, 30),
        lambda: nn.Embedding(90, 40, padding_idx=1),
        lambda: nn.TransformerEncoderLayer(48, 4, 96),
    ],
)
def test_torch_default_is_what_reset_parameters_does(build: Callable[[], nn.Module]) -> None:
    """Standard deviations over 40 draws each; a uniform one of n is known to 0.45 / √n."""
    model = build()
    ours: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    theirs: dict[str, list[Tensor]] = {name: [] for name in ours}
    for seed in range(40):
        initialized(model, "torch_default", seed=seed)
        for name, held in model.named_parameters():
            ours[name].append(held.detach().clone())
        _through_own_reset(model)
        for name, held in model.named_parameters():
            theirs[name].append(held.detach().clone())
    for name, drawn in ours.items():
        mine, torchs = torch.stack(drawn), torch.stack(theirs[name])
        assert float(mine.std()) == pytest.approx(float(torchs.std()), rel=0.1), name
        if not isinstance(model, nn.Embedding):
            assert float(mine.abs().max()) == pytest.approx(float(torchs.abs().max()), rel=0.05)
