"""Each mitigation does what the model would do that has it written into it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.mitigation import MITIGATIONS, effect, mitigation_called, prepare
from gradscope.comparison.sites import Sites, find_sites
from gradscope.comparison.swapping import swapping
from gradscope.errors import ConfigError, ConfigTypeError

TANH = ACTIVATIONS["tanh"]


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 2))


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 2))


def found(model: nn.Module, inputs: Tensor) -> Sites:
    return find_sites(model, lambda: model(inputs).square().sum())


def over_channels(norm: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return norm(values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channel_norm(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x: over_channels(kind(x.shape[1]), x)


def last_norm(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x: kind(x.shape[-1])(x)


def batch_norm_by_hand(x: Tensor) -> Tensor:
    axes = [0, 2, 3] if x.dim() == 4 else list(range(x.dim() - 1))
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def rms_norm_by_hand(x: Tensor) -> Tensor:
    axis = 1 if x.dim() == 4 else -1
    return x / (x.square().mean(axis, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("batchnorm", (batch_norm_by_hand,) * 3),
        ("rmsnorm", (rms_norm_by_hand,) * 3),
        (
            "layernorm",
            (last_norm(nn.LayerNorm), last_norm(nn.LayerNorm), channel_norm(nn.LayerNorm)),
        ),
    ],
)
def test_norms_go_before_each_activation_over_its_units(
    name: str, norms: tuple[Callable[[Tensor], Tensor], ...]
) -> None:
    cases = [(dense(), torch.randn(8, 4)), (dense(), torch.randn(3, 5, 4))]
    for (model, inputs), norm in zip(
        [*cases, (convolutional(), torch.randn(2, 3, 6, 6))], norms, strict=True
    ):
        sites = found(model, inputs)
        expected = inputs
        for layer in model:
            expected = torch.tanh(norm(expected)) if isinstance(layer, nn.ReLU) else layer(expected)
        mitigation, parameters = MITIGATIONS[name], len(list(model.parameters()))
        assert effect(model, sites, mitigation).changes == len(sites.hidden)
        assert prepare(model, sites, mitigation) is model
        with swapping(model, sites, TANH, mitigation=mitigation):
            output = model(inputs)
            output.sum().backward()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        added = list(model.parameters())[parameters:]
        assert len(added) == len(sites.hidden) * (1 if name == "rmsnorm" else 2)
        assert all(p.grad is not None and p.grad.any() for p in added[:-1])
        # Outside, they do nothing, also where a Sequential calls all that it has.
        plain = inputs
        for layer in [*model][:-1]:
            plain = layer(plain)
        assert torch.equal(model(inputs), plain)


def test_a_single_value_of_each_unit_is_a_reason_not_to_normalize_batches() -> None:
    model, inputs = dense(), torch.randn(1, 4)
    sites = found(model, inputs)
    assert "single value" in str(effect(model, sites, MITIGATIONS["batchnorm"]).reason)
    assert effect(model, sites, MITIGATIONS["layernorm"]).reason is None


class Wide(nn.BatchNorm2d):
    """A norm that holds its activation, as timm's BatchNormAct2d does."""

    def __init__(self, units: int) -> None:
        super().__init__(units)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(super().forward(x))
        return result


def test_norms_are_removed_and_their_activations_stay() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Wide(4), nn.GroupNorm(2, 4), nn.Flatten(2), layer)
    model[3] = Rows()
    inputs = torch.randn(2, 3, 5, 5)
    sites = found(model, inputs)
    mitigation = MITIGATIONS["no_normalization"]
    assert effect(model, sites, mitigation).changes == 4
    prepare(model, sites, mitigation)
    with swapping(model, sites, TANH, mitigation=mitigation) as seen:
        output = model(inputs)
    assert seen.missed == ()
    x = model[3](torch.tanh(model[0](inputs)))
    x = x + layer.self_attn(x, x, x)[0]
    x = x + layer.linear2(torch.tanh(layer.linear1(x)))
    torch.testing.assert_close(output, x)
    # Torch's fused kernel of the layer would normalize, whatever its norms are.
    rows = torch.randn(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(rows), layer.train()(rows))
    assert effect(model, sites, mitigation).reason == "the model has no normalization to remove"


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def test_residual_connections_join_activations_of_equal_shape() -> None:
    model, inputs = dense(), torch.randn(8, 4)
    sites = found(model, inputs)
    mitigation = MITIGATIONS["residual"]
    assert effect(model, sites, mitigation).changes == 2
    with swapping(model, sites, TANH, mitigation=mitigation):
        for _ in range(2):
            output = model(inputs)
    x = torch.tanh(model[0](inputs))
    x = x + torch.tanh(model[2](x))
    x = x + torch.tanh(model[4](x))
    torch.testing.assert_close(output, model[6](x))


class Block(nn.Module):
    """It has a skip connection already."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(F.relu(self.first(x)))
        return result


def test_there_is_a_reason_not_to_add_residual_connections() -> None:
    narrowing = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)
    )
    for model in (nn.Sequential(Block(), Block()), narrowing):
        sites = found(model, torch.randn(8, 4))
        assert len(sites.hidden) == 2
        assert "equal shape" in str(effect(model, sites, MITIGATIONS["residual"]).reason)


def test_dropout_follows_each_activation_while_the_model_trains() -> None:
    model, inputs = dense(), torch.randn(200, 4)
    sites = found(model, inputs)
    mitigation = MITIGATIONS["dropout"]
    outputs: list[Tensor] = []
    with swapping(
        model, sites, TANH, mitigation=mitigation, probe=lambda *call: outputs.append(call[2])
    ):
        model(inputs)
        model.eval()
        evaluated = model(inputs)
    shares = [(output == 0).double().mean().item() for output in outputs]
    assert shares[:3] == pytest.approx([mitigation.dropout] * 3, abs=0.04)
    assert shares[3:] == [0.0] * 3
    with swapping(model, sites, TANH):
        assert torch.equal(model(inputs), evaluated)


def test_names_and_functions() -> None:
    for name in ("dropout", "weight_decay", "clip_norm", "clip_value"):
        mitigation = mitigation_called(name)
        assert mitigation.needs_training
        assert getattr(mitigation, name) > 0
    with pytest.raises(
        ConfigError, match="'batch_norm' is unknown; the nearest name is 'batchnorm'"
    ):
        mitigation_called("batch_norm")
    with pytest.raises(ConfigTypeError, match="neither a name nor a function"):
        mitigation_called(3)  # type: ignore[arg-type]
    model = dense()
    sites = found(model, torch.randn(8, 4))

    def halved(net: nn.Module) -> None:
        for parameter in net.parameters():
            parameter.data.mul_(0.5)

    weight = next(model.parameters())
    before = weight.detach().clone()
    assert prepare(model, sites, mitigation_called(halved)) is model
    assert torch.equal(weight, before / 2)
    assert prepare(model, sites, mitigation_called(lambda _: model[0])) is model[0]
    with pytest.raises(ConfigTypeError, match="returned int"):
        prepare(model, sites, mitigation_called(lambda _: 3))  # type: ignore[arg-type, return-value]
