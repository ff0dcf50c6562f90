"""Functional activations are measured like modules, named after the module that calls them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from tests.setups.calls import Net, batch, by_hand, calls, messages, recorded, value
from tests.setups.received import assert_describes
from tests.setups.support import support

Function = Callable[[Tensor], Tensor]

SPELLINGS: dict[str, tuple[str, str, Function]] = {
    "F.relu": ("relu", "ReLU", F.relu),
    "F.relu in place": ("relu", "ReLU", lambda x: F.relu(x, inplace=True)),
    "torch.relu": ("relu", "ReLU", torch.relu),
    "torch.relu_": ("relu", "ReLU", torch.relu_),
    "x.relu()": ("relu", "ReLU", lambda x: x.relu()),
    "x.relu_()": ("relu", "ReLU", lambda x: x.relu_()),
    "of a view, in place": ("relu", "ReLU", lambda x: x.view(-1, 6).relu_()),
    "F.relu6": ("relu6", "ReLU6", F.relu6),
    "F.gelu": ("gelu", "GELU", lambda x: F.gelu(x, approximate="tanh")),
    "F.silu": ("silu", "SiLU", F.silu),
    "F.mish": ("mish", "Mish", F.mish),
    "F.elu": ("elu", "ELU", F.elu),
    "F.leaky_relu": ("leaky_relu", "LeakyReLU", F.leaky_relu),
    "F.glu": ("glu", "GLU", F.glu),
    "F.softplus": ("softplus", "Softplus", F.softplus),
    "F.softsign": ("softsign", "Softsign", F.softsign),
    "F.hardswish": ("hardswish", "Hardswish", F.hardswish),
    "F.tanh": ("tanh", "Tanh", F.tanh),
    "torch.tanh": ("tanh", "Tanh", torch.tanh),
    "x.tanh_()": ("tanh", "Tanh", lambda x: x.tanh_()),
    "F.sigmoid": ("sigmoid", "Sigmoid", F.sigmoid),
    "torch.sigmoid": ("sigmoid", "Sigmoid", torch.sigmoid),
    "torch.special.expit": ("sigmoid", "Sigmoid", torch.special.expit),
    "F.softmax": ("softmax", "Softmax", lambda x: F.softmax(x, dim=-1)),
    "x.softmax()": ("softmax", "Softmax", lambda x: x.softmax(1)),
}


@support(
    "Functional calls",
    "`F.relu`, `torch.tanh`, `x.sigmoid()`, …, in place too",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_outputs_and_their_gradients(spelling: str, tmp_path: Path) -> None:
    name, kind, function = SPELLINGS[spelling]
    torch.manual_seed(0)
    model = Net(function)
    output, gradient = by_hand(model, batch())
    run = recorded(model, [batch()], tmp_path)
    assert calls(run) == [f"(root)/{name}#0"]
    entity = run.modules.entities[run.modules.names.index(f"(root)/{name}#0")]
    assert (entity.kind, entity.group, entity.type) == ("call", "activation", kind)
    assert entity.numel == output.size
    assert_describes(run.modules, "output_", 0, entity.name, output)
    assert_describes(run.modules, "output_grad_", 0, entity.name, gradient)
    assert messages(run) == []


@support("Functional calls", "under autocast", outputs="right", output_gradients="right")
def test_half_precision_under_autocast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(F.gelu)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.net(x)
            return out.float()

    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = by_hand(model, batch())
    run = recorded(Cast(), [batch()], tmp_path)
    assert_describes(run.modules, "output_", 0, "net/gelu#0", output)
    assert_describes(run.modules, "output_grad_", 0, "net/gelu#0", gradient)


SATURATING: dict[str, tuple[Function, Function]] = {
    "tanh": (torch.tanh, lambda y: y.abs() >= 0.97),
    "sigmoid": (F.sigmoid, lambda y: (y <= 0.015) | (y >= 0.985)),
    "softsign": (F.softsign, lambda y: y.abs() >= 0.97),
    "hardsigmoid": (F.hardsigmoid, lambda y: (y <= 0) | (y >= 1)),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, max_val=3.0), lambda y: (y <= -2) | (y >= 3)),
}


@pytest.mark.parametrize("name", SATURATING)
def test_saturated_share(name: str, tmp_path: Path) -> None:
    function, saturates = SATURATING[name]
    torch.manual_seed(0)
    model = Net(function)
    expected = float(saturates(function(model.first(batch() * 9))).double().mean())
    assert 0 < expected < 1
    run = recorded(model, [batch() * 9], tmp_path)
    found = value(run, "output_saturated_fraction", f"(root)/{name}#0")
    assert found == pytest.approx(expected)


def test_dead_units_of_vectors_and_channels(tmp_path: Path) -> None:
    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.hidden = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 36, 10)
            self.head = nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x), inplace=True)
            out: Tensor = self.head(F.relu(self.hidden(x.flatten(1))))
            return out

    torch.manual_seed(0)
    model = Cnn()
    for layer, dead in ((model.conv, [1, 5]), (model.hidden, [0, 3, 7])):
        assert layer.bias is not None
        layer.bias.data.fill_(0.1)
        layer.bias.data[dead] = -1e6
    run = recorded(model, [torch.randn(64, 1, 6, 6) for _ in range(4)], tmp_path)
    assert calls(run) == ["(root)/relu#0", "(root)/relu#1"]
    assert np.isnan(value(run, "dead_unit_fraction", "(root)/relu#0", 2))
    assert value(run, "dead_unit_fraction", "(root)/relu#0", 3) == pytest.approx(2 / 8)
    assert value(run, "dead_unit_fraction", "(root)/relu#1", 3) == pytest.approx(3 / 10)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.relu(self.fc(F.relu(x))))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Nested(nn.Module):
    """Calls of its own before, between and after those of what is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(2))
        self.act, self.swish, self.squared = nn.ReLU(), Swish(), SquaredReLU()
        self.gates = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        for layer in self.layers:
            x = F.relu(layer(x))
        out: Tensor = self.gates(self.squared(self.swish(self.act(self.layers[0](x)))))
        return out


def test_names_are_those_of_the_innermost_modules(tmp_path: Path) -> None:
    run = recorded(Nested(), [batch(), batch()], tmp_path)
    # Measured as modules: act, swish and the gates. Numbers go on where a module runs again.
    inner = ["relu#0", "relu#1", "tanh#0"]
    assert calls(run) == [
        "(root)/gelu#0",
        *(f"layers.0/{call}" for call in inner),
        "(root)/relu#0",
        *(f"layers.1/{call}" for call in inner),
        "(root)/relu#1",
        "layers.0/relu#2",
        "layers.0/relu#3",
        "layers.0/tanh#1",
        "squared/relu#0",
    ]
    assert run.modules.steps.tolist() == [0, 1]
    assert not np.isnan([value(run, "output_rms", name, 1) for name in calls(run)]).any()
    by_depth = [e.name for e in sorted(run.modules.entities, key=lambda e: e.depth)]
    assert by_depth.index("layers.0") < by_depth.index("layers.0/relu#0")
    assert by_depth.index("layers.0/relu#0") < by_depth.index("layers.0.fc")
    assert by_depth.index("layers.0.fc") < by_depth.index("layers.0/relu#1")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "layers.1"}, ["layers.1/relu#0", "layers.1/relu#1", "layers.1/tanh#0"]),
        ({"include": "*/gelu#*"}, ["(root)/gelu#0"]),
        ({"include": "layers.*", "exclude": ["*/relu#*", "layers.0"]}, ["layers.1/tanh#0"]),
        ({"exclude": "*/*"}, []),
    ],
)
def test_patterns_hold_for_a_call_and_for_its_module(
    options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    assert calls(recorded(Nested(), [batch()], tmp_path, **options)) == expected


@support("Functional calls", "in micro-batches", outputs="right", output_gradients="right")
def test_micro_batches_are_one_sample(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(F.relu)
    parts = [by_hand(model, x) for x in (batch(), batch()[:3] * 2)]
    run = recorded(model, [batch(), batch()[:3] * 2], tmp_path, micro=True)
    assert calls(run) == ["(root)/relu#0"]
    output, gradient = (np.concatenate(both) for both in zip(*parts, strict=True))
    assert_describes(run.modules, "output_", 0, "(root)/relu#0", output)
    assert_describes(run.modules, "output_grad_", 0, "(root)/relu#0", gradient)


def test_calls_in_a_long_loop_are_limited(tmp_path: Path) -> None:
    def often(x: Tensor) -> Tensor:
        for _ in range(1000):
            x = F.relu(x)
        return x

    run = recorded(Net(often), [batch()], tmp_path)
    assert calls(run) == [f"(root)/relu#{number}" for number in range(16)]
    assert messages(run) == ["(root) calls relu more than 16 times; further calls are not recorded"]


@pytest.mark.parametrize(
    "reentrant",
    [
        pytest.param(
            False,
            marks=support(
                "Functional calls", "in checkpoints", outputs="right", output_gradients="right"
            ),
        ),
        pytest.param(
            True, marks=support("Functional calls", "in re-entrant checkpoints", outputs="unknown")
        ),
    ],
)
def test_checkpointed_calls_count_once_or_are_named(reentrant: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.inside, x.requires_grad_(), use_reentrant=reentrant)
            out: Tensor = self.last(hidden)
            return out

        def inside(self, x: Tensor) -> Tensor:
            return self.keep(F.relu(self.first(x)))

    output, gradient = by_hand(Net(F.relu), batch())
    torch.manual_seed(0)
    run = recorded(Checkpointed(F.relu), [batch()], tmp_path)
    if reentrant:
        assert calls(run) == []
        assert [m for m in messages(run) if "re-entrant checkpoints" in m]
    else:
        torch.manual_seed(0)
        output, gradient = by_hand(Net(F.relu), batch())
        assert calls(run) == ["(root)/relu#0"]
        assert_describes(run.modules, "output_", 0, "(root)/relu#0", output)
        assert_describes(run.modules, "output_grad_", 0, "(root)/relu#0", gradient)


def per_sample(x: Tensor) -> Tensor:
    result: Tensor = torch.func.vmap(torch.tanh)(x)
    return result


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        F.relu(x)
    return x * 1.0


def traced(x: Tensor) -> Tensor:
    inner = torch.jit.trace(lambda t: F.relu(t) + 1, (x.detach(),))
    result: Tensor = inner(x)
    return result


def own_function(x: Tensor) -> Tensor:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: Tensor) -> Tensor:
            return F.relu(x) * 2

        @staticmethod
        def backward(_: object, gradient: Tensor) -> Tensor:
            return gradient * 2

    result: Tensor = Double.apply(x)  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize("between", [per_sample, without_gradients, traced, own_function])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_not_trainings_own_is_left_alone(between: Function, tmp_path: Path) -> None:
    model = Net(between)
    run = recorded(model, [batch(), batch()], tmp_path)
    assert calls(run) == []
    assert messages(run) == []


@support("Functional calls", "in a model of which a part is compiled", outputs="unknown")
def test_part_that_was_compiled_after_watch(tmp_path: Path) -> None:
    model = Net(F.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        # As Module.compile leaves it, but for the compiling.
        compiled = model.last._call_impl
        model.last._compiled_call_impl = compiled
        model(batch()).sum().backward()
        optimizer.step()
        run = scope.run()
    assert calls(run) == []
    assert messages(run) == ["functional calls are not recorded: parts of the model are compiled"]


class Resting(nn.Module):
    """One part never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.resting = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x))


def test_what_else_is_compiled_in_the_process_does_not_matter(tmp_path: Path) -> None:
    other = nn.Linear(3, 3)
    torch.compile(other, backend="eager")(torch.ones(2, 3))
    model = Resting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert messages(run) == []
    called = run.modules.names.index("(root)/relu#0")
    assert (run.modules["output_rms"][:, called] > 0).all()
