"""Where activations are found, and what is said of those that are left."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.comparison.recognition import activation_modules
from gradscope.comparison.sites import find_sites
from gradscope.comparison.swapping import swapping
from gradscope.errors import ConfigError
from tests.comparison.models import (
    GELU,
    Function,
    Other,
    Quick,
    Sine,
    Stack,
    assert_same,
    forward_of,
    loss_and_gradients,
)


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


def test_an_activation_that_blocks_share_is_a_site_in_each() -> None:
    torch.manual_seed(0)
    shared = nn.ReLU()
    model = nn.Sequential(Stack(shared), nn.Linear(3, 6), Stack(shared))
    sites = find_sites(model, forward_of(model, torch.randn(5, 6)))
    keys = ["0.call", "0.call#1", "2.call", "2.call#1"]
    assert [site.key for site in sites.hidden] == keys
    assert [site.previous for site in sites.hidden] == [None, *keys[:3]]


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
