"""What watching needs beside the training, at its peak; and that models travel while watched."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gradscope.capture.scope import watch

MIB = 1 << 20


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[Any, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {ref for ref, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        # A view of what was there before is not made here.
        made = {ref: size for ref, size in _storages(result) if ref not in given}
        self._sizes |= made
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self._sizes.values()))
        return result


def _storages(value: object) -> Iterator[tuple[Any, int]]:
    for tensor in tree_iter(value):
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            yield StorageWeakRef(storage), storage.nbytes()


def wide_layers() -> nn.Module:
    """3 million weights in large layers: 12 MiB."""
    layers = [part for _ in range(3) for part in (nn.Linear(1024, 1024), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(1024, 8))


def narrow_layers() -> nn.Module:
    """400 thousand in layers below the size from which on a sample is taken."""
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(24)), nn.Linear(128, 8))


def peak(make: Callable[[], nn.Module], batch: int, level: str | None, folder: Path) -> int:
    """Of a few steps, of everything but the model itself."""
    torch.manual_seed(0)
    model = make()
    first = next(p for p in model.parameters() if p.dim() == 2)
    x = torch.randn(batch, first.shape[1])
    optimizer = SGD(model.parameters(), lr=0.01)
    watching: Any = nullcontext()
    if level is not None:
        watching = watch(model, optimizer, log_dir=folder, every=1, level=level)
    measured = Peak()
    with watching as scope, measured:
        for _ in range(3):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if scope is not None:
                scope.log(loss=loss)
    return measured.bytes


@pytest.mark.parametrize(
    ("make", "copied"),
    # Of small parameters weight and gradient are copied; of large ones a sample of each.
    [(narrow_layers, 2.0), (wide_layers, 0.1)],
    ids=["small", "large"],
)
def test_parameters_need_what_the_level_says(
    make: Callable[[], nn.Module], copied: float, tmp_path: Path
) -> None:
    size = sum(p.numel() * p.element_size() for p in make().parameters())
    added = peak(make, 16, "parameters", tmp_path) - peak(make, 16, None, tmp_path)
    assert 0 < added <= copied * size + 2 * MIB


@pytest.mark.parametrize("level", ["full", "deep"])
def test_outputs_need_no_copy_of_themselves(level: str, tmp_path: Path) -> None:
    batch = 4096
    bare = peak(wide_layers, batch, None, tmp_path)
    watched = peak(wide_layers, batch, level, tmp_path)
    one_output = batch * 1024 * 4
    assert bare > 4 * one_output
    assert watched - bare <= one_output // 8


def _trained(model: nn.Module, results: Any) -> None:
    model(torch.ones(2, 6)).sum().backward()
    results.put([None if p.grad is None else p.grad.tolist() for p in model.parameters()])


def test_watched_model_goes_through_spawn(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        # Within a recorded step: the hooks are on.
        model(torch.ones(2, 6)).sum().backward()
        pickle.loads(pickle.dumps(model))  # noqa: S301  (our own)
        process = context.Process(target=_trained, args=(model, results))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        found = results.get()
        assert scope.run().meta["coverage"]["forwards"] == 1
    expected = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    assert len(expected) == 4
    assert found == expected
