"""A swap gives what the model would give that has the other activation written into it."""

import importlib
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradscope.comparison.activation import ACTIVATIONS, Activation
from gradscope.comparison.mitigation import MITIGATIONS, prepare
from gradscope.comparison.recognition import activation_modules
from gradscope.comparison.sites import Site, Sites, find_sites
from gradscope.comparison.swapping import swapping
from gradscope.errors import ConfigError, UsageError

GELU = ACTIVATIONS["gelu"]
Function = Callable[[Tensor], Tensor]


def loss_and_gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Of the parameters that have one, in their order."""
    model.zero_grad()
    loss = forward()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


def forward_of(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: model(inputs).square().sum()


def swapped(model: nn.Module, inputs: Tensor, activation: Activation = GELU) -> list[Tensor]:
    sites = find_sites(model, forward_of(model, inputs))
    with swapping(model, sites, activation) as seen:
        result = loss_and_gradients(model, forward_of(model, inputs))
    assert seen.missed == ()
    return result


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Stack(nn.Module):
    """Two hidden layers with a function between them that is called in a way of its own."""

    def __init__(self, call: Function, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer(x))
        result: Tensor = self.head(x)
        return result


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


class Quick(nn.Module):
    """GELU as CLIP approximates it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Sine(nn.Module):
    """Nothing that the catalogue has, and it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin_()


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


class Other(nn.Module):
    """Not entry by entry, a straight line, or nothing twice."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_modules_are_told_by_what_they_return() -> None:
    others: list[Function] = [
        lambda x: x.softmax(-1),
        lambda x: x - x.mean(),
        lambda x: 2 * x + 1,
        lambda x: x * torch.rand_like(x),
        lambda x: x.chunk(2, -1)[0],
        lambda x: x.reshape(4, 3, -1),
        torch.log,
    ]
    modules = {str(i): Other(function) for i, function in enumerate(others)}
    state = torch.random.get_rng_state()
    assert activation_modules(modules) == {}
    assert torch.equal(torch.random.get_rng_state(), state)
    own = {"quick": Quick(), "sine": Sine(), "hard": Other(lambda x: F.relu6(x + 3) / 6)}
    assert activation_modules(own) == {"quick": "gelu", "sine": None, "hard": "hardsigmoid"}


def test_units_are_where_the_layer_before_has_them() -> None:
    def moved(*order: int) -> nn.Module:
        return Other(lambda x: x.permute(order))

    norm = [moved(0, 2, 3, 1), nn.LayerNorm(4), moved(0, 3, 1, 2)]
    images, rows = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 7)
    for layers, inputs, dimension in (
        ([nn.Conv2d(3, 4, 2)], images, 1),
        ([nn.Conv2d(3, 4, 2), *norm], images, 1),
        ([nn.Conv2d(3, 4, 2), *norm[:2], nn.Linear(4, 6)], images, -1),
        ([nn.Conv1d(3, 4, 2)], rows, 1),
        ([nn.Conv1d(3, 4, 2), Other(lambda x: x.transpose(-1, -2))], rows, -1),
        ([nn.Linear(7, 4)], rows, -1),
        ([nn.Linear(7, 4), moved(2, 0, 1)], rows, 0),
    ):
        model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        model(inputs)
        (site,) = find_sites(model, forward_of(model, inputs)).hidden
        assert site.unit_dimension == dimension


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


def test_an_activation_that_blocks_share_is_a_site_in_each() -> None:
    torch.manual_seed(0)
    shared = nn.ReLU()
    model = nn.Sequential(Stack(shared), nn.Linear(3, 6), Stack(shared))
    sites = find_sites(model, forward_of(model, torch.randn(5, 6)))
    keys = ["0.call", "0.call#1", "2.call", "2.call#1"]
    assert [site.key for site in sites.hidden] == keys
    assert [site.previous for site in sites.hidden] == [None, *keys[:3]]


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


def _rectified(layer: nn.Module, x: Tensor) -> Tensor:
    return F.relu(layer(x))


class Parts(nn.Module):
    """Parts of the forward run again in the backward; some without a module of their own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.reentrant, self.on = reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = self.part(self.inside, x)
        x = self.part(self.block, x)
        for layer in self.layers[:2]:
            x = self.part(partial(_rectified, layer), x)
        result: Tensor = self.layers[3](x)
        return result

    def inside(self, x: Tensor) -> Tensor:
        return F.relu(self.layers[2](F.relu(self.layers[1](x))))

    def part(self, function: Function, x: Tensor) -> Tensor:
        if not self.on:
            return function(x)
        result: Tensor = checkpoint(function, x, use_reentrant=self.reentrant)
        return result


def backward(loss: Tensor, model: nn.Module) -> None:
    del model
    loss.backward()


def backward_of_several(loss: Tensor, model: nn.Module) -> None:
    del model
    torch.autograd.backward([loss])


def backward_twice(loss: Tensor, model: nn.Module) -> None:
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def gradients_asked_for(loss: Tensor, model: nn.Module) -> None:
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize(
    ("reentrant", "differentiate"),
    [
        (False, backward),
        (False, backward_of_several),
        (False, backward_twice),
        (False, gradients_asked_for),
        (True, backward),
        (True, backward_twice),
    ],
)
def test_checkpoints_repeat_the_same_sites(
    reentrant: bool, differentiate: Callable[[Tensor, nn.Module], None]
) -> None:
    torch.manual_seed(0)
    model, inputs = Parts(reentrant), torch.randn(5, 6)
    forward = forward_of(model, inputs)
    sites = find_sites(model, forward)
    assert len(sites.hidden) == 6
    # A norm before each, none like another: a site that is mistaken for another shows.
    norms = MITIGATIONS["layernorm"]
    prepare(model, sites, norms)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    probed: list[str] = []
    with swapping(
        model, sites, GELU, mitigation=norms, probe=lambda site, *_: probed.append(site.key)
    ) as seen:
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for model.on, gradients in ((True, found), (False, expected)):
            model.zero_grad()
            differentiate(forward(), model)
            gradients += [p.grad for p in model.parameters() if p.grad is not None]
            if model.on:
                repeats = len(probed) - 6
    assert seen.counts == dict.fromkeys(seen.counts, 2)
    # In repeats for what a re-entrant one saves there are gradients, in others none ever.
    assert (repeats > 0) == reentrant
    assert len(found) == 22
    assert_same(found, expected, 1e-6)


def test_a_repeat_that_can_not_be_told_is_an_error_and_not_a_wrong_gradient() -> None:
    class Nested(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.outside, x)

        def outside(self, x: Tensor) -> Tensor:
            result: Tensor = self.layers[3](self.part(self.inside, x))
            return result

    torch.manual_seed(0)
    model, inputs = Nested(False), torch.randn(5, 6)
    sites = find_sites(model, forward_of(model, inputs))
    with swapping(model, sites, GELU), pytest.raises(UsageError, match="inside a checkpoint"):
        loss_and_gradients(model, forward_of(model, inputs))


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


class Gated(nn.Module):
    """Gates, an activation that is written out, a GLU, and one at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.scale = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * torch.sigmoid(self.b(x))
        x = self.c(x)
        x = x * x.sigmoid()
        x = self.scale * torch.tanh(self.a(x))
        x = F.silu(self.b(x)) * self.c(x)
        x = self.c(x)
        x = x * torch.tanh(F.softplus(x))
        return torch.tanh(self.d(x))


def test_gates_outputs_and_what_is_written_out_stay() -> None:
    torch.manual_seed(0)
    model, inputs = Gated(), torch.randn(5, 6)
    sites = find_sites(model, forward_of(model, inputs))
    root = "(root)"
    assert [site.key for site in sites.hidden] == [f"{root}/tanh", f"{root}/silu"]
    reasons = {key: why.partition(": ")[2] for key, why in sites.left.items()}
    assert reasons == {
        f"{root}/sigmoid": "a gate: its output is a factor",
        f"{root}/sigmoid#1": "a part of an activation that is written out",
        f"{root}/softplus": "a part of an activation that is written out",
        f"{root}/tanh#1": "a part of an activation that is written out",
        f"{root}/tanh#2": "an output: no layer with weights follows",
    }


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.lstm(x)[0][:, -1]))


def test_where_nothing_can_be_swapped_the_error_says_what_there_is() -> None:
    model, inputs = Recurrent(), torch.randn(3, 5, 4)
    with pytest.raises(ConfigError, match=r"none that can be swapped.*inside nn.LSTM"):
        find_sites(model, forward_of(model, inputs))
    with pytest.raises(ConfigError, match="scalar with a graph"):
        find_sites(model, lambda: model(inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_out_of_reach_is_named() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    inner = Stack(lambda x: torch.maximum(x.clamp(min=0), torch.zeros(())))
    model, inputs = nn.Sequential(scripted, inner, nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 6)
    sites = find_sites(model, forward_of(model, inputs), include=["[2-9]"])
    assert [site.key for site in sites.hidden] == ["2"]
    assert sites.left["0"] == "torch.jit.script or trace"
    assert sites.left["1/clamp"] == "written as clamp at 0"
    assert sites.left["1/maximum"] == "written as maximum at 0"
    with pytest.raises(ConfigError, match=r"2 \(in exclude\)"):
        find_sites(model, forward_of(model, inputs), exclude=["2"])
    with pytest.raises(ConfigError, match="uncompiled"):
        find_sites(torch.compile(inner), forward_of(inner, inputs))  # type: ignore[arg-type]
    compiled: Any = torch.compile(Stack(F.relu), backend="eager")
    partly = nn.Sequential(compiled, nn.Tanh(), nn.Linear(3, 2))
    sites = find_sites(partly, forward_of(partly, inputs))
    assert ([site.key for site in sites.hidden], sites.left) == (["1"], {"0": "torch.compile"})
    with swapping(partly, sites, GELU) as seen:
        found = loss_and_gradients(partly, forward_of(partly, inputs))
    assert seen.counts == {"1": 1}
    partly[1] = nn.GELU()
    assert_same(found, loss_and_gradients(partly, forward_of(partly, inputs)))
    outside = find_sites(partly, lambda: partly[2](F.relu(partly[:2](inputs))).sum())
    assert outside.left["(outside)/relu"] == "called outside every forward of a module"
    relu = torch.jit.script(_scripted)
    hybrid = nn.Sequential(Stack(relu), nn.Tanh(), nn.Linear(3, 2))
    left = find_sites(hybrid, forward_of(hybrid, inputs)).left
    assert left == {
        "ReluBackward0": "2 in the graph, called outside Python (a scripted function, an extension)"
    }


def _scripted(x: Tensor) -> Tensor:
    return torch.relu(x)


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
