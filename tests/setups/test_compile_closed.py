"""Compiled models with parts that gradscope's ops can't be in: they train as they do unwatched."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.setups.compiling import batch, fresh
from tests.setups.received import entries
from tests.setups.support import support


class Part(nn.Module):
    """Six entries in, six out: what is called in a special way."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.tanh(self.inner(x)))
        return out


class Whole(nn.Module):
    """Two parts, called as `way` says, and a head."""

    def __init__(self, way: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = Part(), Part(), nn.Linear(6, 5)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.way(self.first, self.second, x))
        return out


def mapped(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = torch.vmap(second)(torch.vmap(first)(x))
    return out


def chosen(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = torch.cond(x.sum() > 0, first, second, (x,))
    return out


def differentiated(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = second(x) + torch.func.grad(lambda z: first(z).square().sum())(x)
    return out


@torch.compiler.nested_compile_region
def region(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


def in_regions(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = region(second, region(first, x))
    return out


def in_turn(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = second(first(x))
    return out


def compiled_autograd() -> AbstractContextManager[object]:
    patched: AbstractContextManager[object] = torch._dynamo.config.patch(compiled_autograd=True)
    return patched


def trained(
    build: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], Any],
    around: Callable[[], AbstractContextManager[object]],
    folder: Path | None,
) -> tuple[dict[str, bytes], list[dict[str, float]], Run | None]:
    """The weights that three steps lead to, the norms of the gradients, and the run if watched."""
    torch._dynamo.reset()
    model = fresh(build)
    optimizer = SGD(model.parameters(), 0.1)
    forward, norms = wrap(model), []
    scope = None if folder is None else watch(forward, optimizer, log_dir=folder, every=1)
    with around():
        for number in range(3):
            x, y = batch(number)
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            given = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            norms.append({n: float(np.linalg.norm(entries(g))) for n, g in given.items()})
            optimizer.step()
            optimizer.zero_grad()
            if scope is not None:
                scope.log(loss=loss)
    run = None
    if scope is not None:
        run = scope.run()
        scope.close()
    weights = {n: p.detach().numpy().tobytes() for n, p in model.named_parameters()}
    return weights, norms, run


def assert_trains_as_ever(
    build: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], Any],
    around: Callable[[], AbstractContextManager[object]],
    folder: Path,
    said: str,
) -> Run:
    bare, norms, _ = trained(build, wrap, around, None)
    watched, _, run = trained(build, wrap, around, folder)
    assert watched == bare
    assert run is not None
    for row, expected in enumerate(norms):
        for name, norm in expected.items():
            found = run.parameters["grad_norm"][row, run.parameters.names.index(name)]
            assert found == pytest.approx(norm, rel=1e-4)
    messages = [problem["message"] for problem in run.meta["problems"]]
    assert any(said in message and "not recorded" in message for message in messages), messages
    return run


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")


def closed(setup: str) -> pytest.MarkDecorator:
    return support(
        "torch.compile", setup, parameters="right", outputs="unknown", output_gradients="unknown"
    )


WAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "`vmap` of modules": (mapped, "torch.func"),
    "`torch.cond`": (chosen, "torch.cond"),
    "`func.grad` of modules": (differentiated, "torch.func"),
    "nested compile regions": (in_regions, "nested compiled regions"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=closed(n)) for n in WAYS])
def test_parts_that_are_graphs_of_their_own(name: str, tmp_path: Path) -> None:
    way, said = WAYS[name]
    run = assert_trains_as_ever(lambda: Whole(way), compiled, nullcontext, tmp_path, said)
    inside = [n for n in run.modules.names if n.startswith("first.")]
    gradients = [run.modules["output_grad_norm"][:, run.modules.names.index(n)] for n in inside]
    assert np.isnan(gradients).all()


@closed("compiled autograd")
def test_compiled_autograd(tmp_path: Path) -> None:
    assert_trains_as_ever(
        lambda: Whole(in_turn), compiled, compiled_autograd, tmp_path, "compiled_autograd"
    )


@closed("DDP, its buckets compiled one by one")
@pytest.mark.usefixtures("alone")
def test_buckets_of_ddp(tmp_path: Path) -> None:
    def build() -> nn.Module:
        # Each layer more than the first bucket takes.
        wide = [nn.Linear(600, 600) for _ in range(4)]
        return nn.Sequential(nn.Linear(6, 600), *wide, nn.Linear(600, 5))

    def wrap(model: nn.Module) -> Any:
        return compiled(DistributedDataParallel(model, bucket_cap_mb=1))

    assert_trains_as_ever(build, wrap, nullcontext, tmp_path / "run", "DDP's compiled buckets")
