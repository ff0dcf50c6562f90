"""A swap gives what the model would give that has the other activation written into it."""

import importlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.sites import Site, Sites, find_sites
from gradscope.comparison.swapping import swapping
from tests.comparison.models import (
    GELU,
    Function,
    Parts,
    Quick,
    Sine,
    Stack,
    assert_same,
    forward_of,
    loss_and_gradients,
    swapped,
)


class Ignoring(Stack):
    """Calls for the effect in place, and does not take what is returned."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.call(x)
        result: Tensor = self.head(x)
        return result


def written_with(model: Stack, kind: type[Stack] = Stack) -> Stack:
    twin = kind(F.gelu)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


CALLS: dict[str, Function] = {
    "own module": Quick(),
    "unknown module": Sine(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace=True)": nn.ReLU(inplace=True),
    "nn.PReLU": nn.PReLU(),
    "F.relu": F.relu,
    "F.relu(inplace=True)": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "input=": lambda x: F.silu(input=x),
    "tanh": torch.tanh,
    "F.sigmoid": F.sigmoid,
    "selu": F.selu,
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.25)),
    "nested": nn.Sequential(nn.Identity(), nn.Sequential(nn.Tanh())),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_spelling_is_swapped_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = Stack(CALLS[name]), torch.randn(5, 6)
    assert_same(
        swapped(model, inputs),
        loss_and_gradients(twin := written_with(model), forward_of(twin, inputs)),
    )


@pytest.mark.parametrize("call", [F.relu_, lambda x: x.relu_(), nn.ReLU(inplace=True), torch.tanh_])
def test_what_works_in_place_is_found_in_its_input(call: Function) -> None:
    torch.manual_seed(0)
    model, inputs = Ignoring(call), torch.randn(5, 6)
    assert_same(
        swapped(model, inputs),
        loss_and_gradients(twin := written_with(model), forward_of(twin, inputs)),
    )


class Halves(Stack):
    """Half of the units are rectified, in place through a view."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.call(x[:, :3])
        result: Tensor = self.head(x)
        return result


def test_a_view_is_written_into() -> None:
    torch.manual_seed(0)
    model, inputs = Halves(torch.relu_), torch.randn(5, 6)
    twin = Halves(lambda x: x.copy_(F.gelu(x.clone())))
    twin.load_state_dict(model.state_dict())
    assert_same(swapped(model, inputs), loss_and_gradients(twin, forward_of(twin, inputs)))


class Aliased(nn.Module):
    """The skip connection carries what was rectified in place, as in many a pre-activation net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.act(x))
        result: Tensor = self.head(self.act(x + y))
        return result


def test_its_own_activation_changes_nothing_and_a_probe_sees_what_enters_and_leaves() -> None:
    torch.manual_seed(0)
    model, inputs = Aliased(), torch.randn(5, 6)
    forward = forward_of(model, inputs)
    expected = loss_and_gradients(model, forward)
    sites = find_sites(model, forward)
    # One module at two places.
    assert [site.key for site in sites.hidden] == ["act", "act#1"]
    assert_same(swapped(model, inputs, ACTIVATIONS["relu"]), expected)
    probed: list[tuple[Site, Tensor, Tensor]] = []
    with swapping(model, sites, None, probe=lambda *call: probed.append(call)):
        assert_same(loss_and_gradients(model, forward), expected)
    assert [site for site, _, _ in probed] == list(sites.hidden)
    for _, before, output in probed:
        assert torch.equal(output, before.relu())
    assert torch.equal(probed[0][1], model.first(inputs))


def test_nothing_is_left_behind_also_after_an_exception() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Parts(False), nn.GELU(), nn.Linear(6, 2)), torch.randn(5, 6)

    def state() -> list[Any]:
        return [
            (name, list(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]

    before, keys = state(), list(model.state_dict())
    sites = find_sites(model, forward_of(model, inputs))
    assert state() == before
    expected = loss_and_gradients(model, forward_of(model, inputs))
    modes = len(torch.overrides._get_current_function_mode_stack())

    def fails(*_: object) -> None:
        message = "a probe's own mistake"
        raise ZeroDivisionError(message)

    with pytest.raises(ZeroDivisionError), swapping(model, sites, GELU, probe=fails):
        model(inputs)
    assert (state(), list(model.state_dict())) == (before, keys)
    assert len(torch.overrides._get_current_function_mode_stack()) == modes
    assert_same(loss_and_gradients(model, forward_of(model, inputs)), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_of_torch(training: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
    model = nn.TransformerEncoderLayer(**sizes, activation="relu").train(training)  # type: ignore[arg-type]
    twin = nn.TransformerEncoderLayer(**sizes, activation=torch.tanh).train(training)  # type: ignore[arg-type]
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(3, 4, 8)
    found = swapped(model, inputs, ACTIVATIONS["tanh"])
    assert_same(found, loss_and_gradients(twin, forward_of(twin, inputs)))
    sites = find_sites(model, forward_of(model, inputs))
    # Without gradients torch would take its fused kernel.
    with torch.no_grad(), swapping(model, sites, ACTIVATIONS["tanh"]):
        torch.testing.assert_close(model(inputs), twin(inputs))


def _hidden(sites: Sites) -> list[str | None]:
    return [site.activation for site in sites.hidden]


def test_models_of_libraries() -> None:
    # It lets torchvision be imported beside a torch that isn't its own.
    importlib.import_module("tests.models")
    import timm
    import torchvision
    import transformers

    torch.manual_seed(0)
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    settings = {**config, **still, "bos_token_id": 0, "eos_token_id": 0}
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**settings, activation_function="silu")
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    model.load_state_dict(twin.state_dict())
    words = torch.randint(20, (2, 8))

    def language(net: nn.Module) -> Callable[[], Tensor]:
        return lambda: net(input_ids=words, labels=words).loss

    sites = find_sites(model, language(model))
    assert _hidden(sites) == ["gelu_tanh", "gelu_tanh"]
    with swapping(model, sites, ACTIVATIONS["silu"]):
        found = loss_and_gradients(model, language(model))
    assert_same(found, loss_and_gradients(twin, language(twin)), 1e-6)

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    sites = find_sites(bert, lambda: bert(input_ids=words, labels=words[:, 0] % 2).loss)
    # The last is its pooler's, with the classifier behind it.
    assert _hidden(sites) == ["gelu", "gelu", "tanh"]

    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    other = deepcopy(resnet)
    for module in [*other.modules()]:
        if hasattr(module, "relu"):
            module.relu = nn.GELU()
    images = torch.randn(2, 3, 32, 32)
    sites = find_sites(resnet, forward_of(resnet, images))
    assert len(sites.hidden) == 9
    assert {site.unit_dimension for site in sites.hidden} == {1}
    resnet.load_state_dict(other.state_dict())
    with swapping(resnet, sites, GELU):
        found = loss_and_gradients(resnet, forward_of(resnet, images))
    assert_same(found, loss_and_gradients(other, forward_of(other, images)))

    mobile = torchvision.models.mobilenet_v3_small(num_classes=5)
    sites = find_sites(mobile, forward_of(mobile, images))
    assert set(_hidden(sites)) == {"hardswish", "relu"}
    gates = [m for m in mobile.modules() if isinstance(m, nn.Hardsigmoid)]
    assert len(sites.left) == len(gates) == 9

    vit = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert set(_hidden(find_sites(vit, forward_of(vit, images)))) == {"gelu"}
    conv = timm.create_model("convnext_atto", num_classes=3)
    sites = find_sites(conv, forward_of(conv, images))
    assert len(sites.hidden) == 12
    # Each block has a skip connection: no chain is a plain one.
    assert {site.previous for site in sites.hidden} == {None}
