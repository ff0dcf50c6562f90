"""Trainings of several processes, and the same in one process on the whole batch."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer

from gradscope.capture.scope import Scope, watch
from tests.capture.reference import Numbers, ParameterReference
from tests.setups.processes import Place

STEPS = 4
BATCH = 8


def net(width: int = 10) -> nn.Module:
    """Neither 10 nor 3 divides by 4: shards differ in size, and one is empty."""
    torch.manual_seed(1)
    model = nn.Sequential(
        OrderedDict(
            first=nn.Linear(6, width),
            act=nn.ReLU(),
            block=nn.Sequential(nn.Linear(width, width), nn.Tanh()),
            norm=nn.LayerNorm(width),
            last=nn.Linear(width, 3),
        )
    )
    model.get_parameter("block.0.bias").requires_grad_(False)
    return model


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, torch.randn(BATCH, 3, generator=generator)


def share(place: Place, number: int) -> tuple[Tensor, Tensor]:
    """This process's part of the batch."""
    return piece(place, number, place.rank, place.size)


def piece(place: Place, number: int, index: int, of: int) -> tuple[Tensor, Tensor]:
    x, y = batch(number)
    return x.chunk(of)[index].to(place.device), y.chunk(of)[index].to(place.device)


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.3, momentum=0.9)


def expected(
    model: nn.Module | None = None, *, steps: int = STEPS, clip: float | None = None
) -> list[dict[str, Numbers]]:
    """The numbers of the same training in one process."""
    model = model or net()
    optimizer = sgd(model.parameters())
    reference = ParameterReference(model)
    for number in range(steps):
        x, y = batch(number)
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        reference.before_update()
        optimizer.step()
        reference.after_update()
    return reference.steps


@dataclass
class Sharded:
    """A model that is trained by several processes."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    data: Callable[[int], tuple[Tensor, Tensor]]

    def step(self, number: int, between: Callable[[], object] = lambda: None) -> Tensor:
        x, y = self.data(number)
        self.model.zero_grad()
        loss = F.mse_loss(self.model(x), y)
        loss.backward()
        between()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def train(self, scope: Scope | None, steps: int = STEPS) -> None:
        for number in range(steps):
            loss = self.step(number)
            if scope is not None:
                scope.log(loss=loss)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """fully_shard it, the block by itself."""
    fully_shard(model.get_submodule("block"), **options)
    fully_shard(model, **options)
    return model


def fsdp(place: Place, **options: Any) -> Sharded:
    model = shard(net().to(place.device), **options)
    return Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))


def watched(place: Place, training: Sharded, **options: Any) -> Scope:
    settings = {"optimizer": training.optimizers, "every": 1, **options}
    return watch(training.model, log_dir=place.folder, **settings)


def recorded(place: Place, training: Sharded, steps: int = STEPS, **options: Any) -> None:
    """Train, watched."""
    with watched(place, training, **options) as scope:
        training.train(scope, steps)


@contextlib.contextmanager
def reductions() -> Iterator[list[str]]:
    """The reductions that gradscope makes, in order: SUM or MAX."""
    seen: list[str] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        import sys

        if sys._getframe(1).f_globals["__name__"].startswith("gradscope"):
            seen.append(str(op).rpartition(".")[2])
        return original(tensor, op, **options)

    with mock.patch.object(dist, "all_reduce", counting):
        yield seen
