"""Models that call functions, their forward spelled out, and what is seen of the calls."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.overrides import TorchFunctionMode

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.reference import F64, wide

BATCH = 8


class Net(nn.Module):
    """A layer before and a layer after what is given; `keep` sees what passes through it."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.LazyLinear(3)
        self.between = between
        self.keep: Callable[[Tensor], Tensor] = lambda value: value
        self(torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.keep(self.between(self.first(x))))
        return out


def batch() -> Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1)) * 3


def by_hand(model: Net, x: Tensor) -> tuple[F64, F64]:
    """What is between the layers, and the gradient arriving there of the sum of squares."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value * 1.0

    model.keep = keep
    gradient = torch.autograd.grad(model(x).square().sum(), kept)[0]
    model.keep = lambda value: value
    return wide(kept[0].detach()), wide(gradient)


def recorded(
    model: nn.Module, inputs: Iterable[Any], log_dir: Path, *, micro: bool = False, **options: Any
) -> Run:
    """A run of one step per input, or of one step with all of them."""
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=log_dir, every=1, **options) as scope:
        for x in inputs:
            model(x).square().sum().backward()
            if not micro:
                optimizer.step()
        if micro:
            optimizer.step()
        scope.log(loss=1.0)
        run = scope.run()
    assert modes() == []
    return run


def calls(run: Run) -> list[str]:
    """The names of the calls that were seen, in the order of depth."""
    entities = sorted(run.modules.entities, key=lambda entity: entity.depth)
    return [entity.name for entity in entities if entity.kind == "call"]


def value(run: Run, quantity: str, name: str, row: int = 0) -> float:
    return float(run.modules[quantity][row, run.modules.names.index(name)])


def messages(run: Run) -> list[str]:
    return [problem["message"] for problem in run.meta["problems"]]


def modes() -> list[TorchFunctionMode]:
    """Those that are on in this thread."""
    on: list[TorchFunctionMode] = torch.overrides._get_current_function_mode_stack()
    return on
