"""Models, ways to compile them, and an eager twin to compare with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.record import Run, Table
from tests.capture.reference import F64, described
from tests.setups.received import entries

Forward = Callable[[Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(self.act(self.inner(x)))
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def plain() -> nn.Module:
    """A model of one of torch's own classes, which torch.compile treats in another way."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


# The ways to compile.

Compile = Callable[..., Forward]


def compiled_module(module: nn.Module, **options: Any) -> nn.Module:
    made = torch.compile(module, **options)
    assert isinstance(made, nn.Module)
    return made


def whole(model: nn.Module, **options: Any) -> Forward:
    return compiled_module(model, **options)


def in_place(model: nn.Module, **options: Any) -> Forward:
    model.compile(**options)
    return model


def regional(model: nn.Module, **options: Any) -> Forward:
    layers = model.get_submodule("layers")
    for layer in layers.children():
        layer.compile(**options)
    return model


def replaced(model: nn.Module, **options: Any) -> Forward:
    layers = model.get_submodule("layers")
    for name, layer in list(layers.named_children()):
        layers.register_module(name, compiled_module(layer, **options))
    return model


def one_part(model: nn.Module, **options: Any) -> Forward:
    model.get_submodule("layers.1").compile(**options)
    return model


def function(model: nn.Module, **options: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = model(x) * 1.0
        return out

    return torch.compile(forward, **options)


WAYS: dict[str, tuple[Callable[[], nn.Module], Compile]] = {
    "whole": (Blocks, whole),
    "whole, torch's class": (plain, whole),
    "in place": (Blocks, in_place),
    "regional": (Blocks, regional),
    "replaced": (Blocks, replaced),
    "one part": (Blocks, one_part),
    "function": (Blocks, function),
}


@dataclass
class Trained:
    """What a training leads to."""

    gradients: list[Tensor] = field(default_factory=list)

    def same_bits(self, other: "Trained") -> bool:
        pairs = zip(self.gradients, other.gradients, strict=True)
        return all(torch.equal(one, two) for one, two in pairs)


def train(
    model: nn.Module, forward: Forward, steps: int, after: Callable[[Tensor], object] = id
) -> Trained:
    optimizer, trained = SGD(model.parameters(), lr=0.05), Trained()
    for step in range(steps):
        x, y = batch(step)
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        trained.gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        after(loss.detach())
    return trained


def graphs() -> tuple[int, int, int]:
    """How many were made, how many breaks there were, and how many recompilations."""
    breaks, again = counters["graph_break"], counters["recompiles"]
    return counters["stats"]["unique_graphs"], sum(breaks.values()), sum(again.values())


class Eager:
    """Every output of an eager twin and the gradient arriving there, step by step, in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[dict[str, F64]] = [{}]
        self._uses: dict[str, int] = {}
        model.register_forward_pre_hook(lambda *_: self._uses.clear())
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList):
                module.register_forward_hook(partial(self._see, name or "(root)"))

    def _see(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        if not torch.is_grad_enabled():
            return
        use = self._uses[name] = self._uses.get(name, -1) + 1
        name = f"{name}#{use}" if use else name
        self._add(f"output_{name}", output)
        output.register_hook(lambda gradient: self._add(f"output_grad_{name}", gradient))

    def _add(self, key: str, tensor: Tensor) -> None:
        seen = self.steps[-1]
        seen[key] = np.concatenate([seen.get(key, np.empty(0)), entries(tensor)])

    def step_ends(self, _: object = None) -> None:
        self.steps.append({})


def missed(run: Run) -> list[str]:
    """What the run says it could not do, but for functional calls, which no graph tells of."""
    said = [problem["message"] for problem in run.meta["problems"]]
    return [message for message in said if not message.startswith("functional calls")]


def assert_equals_eager(
    table: Table, eager: Eager, *, rtol: float = 1e-5, but: Sequence[int] = ()
) -> None:
    """All statistics of all uses and steps that are recorded, but for some rows."""
    assert len(table.steps) > len(but)
    for row, step in enumerate(table.steps):
        if row in but:
            continue
        names = {
            key.removeprefix("output_grad_").removeprefix("output_") for key in eager.steps[step]
        }
        # Of functions that are called, eager steps tell.
        assert {entity.name for entity in table.entities if entity.kind == "module"} == names
        for key, numbers in eager.steps[step].items():
            prefix = "output_grad_" if key.startswith("output_grad_") else "output_"
            wanted = described([torch.from_numpy(numbers)])
            for statistic, value in wanted.items():
                if prefix + statistic not in table:
                    continue
                found = table[prefix + statistic][row, table.names.index(key[len(prefix) :])]
                slack = 1e-6 * wanted["rms"]
                assert np.isclose(found, value, rtol=rtol, atol=slack), (row, key, statistic)


def eager_twin(build: Callable[[], nn.Module], steps: int) -> Eager:
    model = fresh(build)
    eager = Eager(model)
    train(model, model, steps, eager.step_ends)
    return eager
