"""Embeddings by the rows that a batch touches, layers that are made late, very many layers."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer, SparseAdam

from gradscope.capture.scope import watch
from tests.capture.trainings import vectors
from tests.setups.support import support
from tests.setups.twins import STEPS, Subject, compared


class Bag(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 4, sparse=sparse, padding_idx=0)
        self.bag = nn.EmbeddingBag(30, 4, mode="sum", sparse=sparse)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(tokens).sum(1) + self.bag(tokens))
        return out


def batch() -> Tensor:
    """Some rows several times, some never."""
    tokens = torch.randint(0, 30, (3, 4))
    tokens[0] = tokens[1]
    return tokens


def embeddings(*, sparse: bool, make: Callable[..., Optimizer]) -> Subject:
    model = Bag(sparse=sparse)
    tables = [*model.words.parameters(), *model.bag.parameters()]
    optimizers = [make(tables, lr=0.1), SGD(model.head.parameters(), lr=0.1)]

    def body(number: int) -> None:
        del number
        tokens = batch()
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(tokens), torch.randint(5, (3,))).backward()
        for optimizer in optimizers:
            optimizer.step()

    return Subject(model, optimizers, body)


@pytest.mark.parametrize(
    ("sparse", "make"),
    [
        pytest.param(
            sparse,
            make,
            id=name,
            marks=support(
                "Modules", name, parameters="right", outputs="right", output_gradients="right"
            ),
        )
        for name, sparse, make in (
            ("embeddings, `sparse=True`, SparseAdam", True, SparseAdam),
            ("embeddings, `sparse=True`, SGD", True, SGD),
            ("embeddings, dense gradients", False, SGD),
        )
    ],
)
def test_rows_that_the_gradient_touches(
    sparse: bool, make: Callable[..., Optimizer], tmp_path: Path
) -> None:
    def build() -> Subject:
        return embeddings(sparse=sparse, make=make)

    table = compared(build, tmp_path).parameters
    for number in range(STEPS):
        torch.manual_seed(100 + number)
        rows = set(batch().flatten().tolist())
        share = dict(zip(table.names, table["grad_touched_fraction"][number], strict=True))
        assert share["words.weight"] == pytest.approx(len(rows - {0}) / 50)
        assert share["bag.weight"] == pytest.approx(len(rows) / 30)
        assert np.isnan(share["head.weight"])


def lazy() -> Subject:
    """Made in the first forward; the optimizer is built then."""
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(5))
    made: list[Optimizer] = []
    subject = Subject(model, made, lambda _: None)

    def body(number: int) -> None:
        del number
        x, y = vectors()
        loss = F.cross_entropy(model(x), y)
        if not made:
            made.append(SGD(model.parameters(), lr=0.1))
            subject.built(made[0])
        made[0].zero_grad()
        loss.backward()
        made[0].step()

    subject.body = body
    return subject


@support("Modules", "lazy modules", parameters="right", outputs="right", output_gradients="right")
def test_lazy_modules(tmp_path: Path) -> None:
    run = compared(lazy, tmp_path, given=False)
    assert run.parameters.entities[0].shape == (8, 6)
    assert run.modules.entities[run.modules.names.index("0")].type == "Linear"


class Calls:
    """How often gradscope calls anything, or is called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        del argument
        self.count += event in {"call", "c_call"} and "gradscope/" in frame.f_code.co_filename


def calls_of_two_steps(layers: int, folder: Path) -> int:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    optimizer = SGD(model.parameters(), lr=0.1)
    counter = Calls()
    sys.setprofile(counter)
    try:
        with watch(model, optimizer, log_dir=folder, every=1) as scope:
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                scope.log(loss=0.0)
    finally:
        sys.setprofile(None)
    return counter.count


def test_work_per_module_does_not_grow_with_their_number(tmp_path: Path) -> None:
    few, many = (calls_of_two_steps(n, tmp_path / str(n)) for n in (30, 300))
    assert few > 30 * 10
    assert many < 10 * few


@support("Modules", "10 000 modules", parameters="right", outputs="right", output_gradients="right")
def test_ten_thousand_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), *(nn.Identity() for _ in range(9_997)), nn.Linear(5, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    x, y = vectors()
    hidden = model[0](x)
    hidden.retain_grad()
    F.cross_entropy(model[-1](hidden), y).backward()
    assert hidden.grad is not None
    optimizer.zero_grad()
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scope.log(loss=0.0)
        run = scope.run()
    coverage = run.meta["coverage"]["modules"]
    assert coverage["expected"] == coverage["seen"] == 10_000
    assert coverage["output_gradients_seen"] == 10_000
    between = run.modules["output_grad_norm"][0, :9_998]
    np.testing.assert_allclose(between, float(hidden.grad.norm()), rtol=1e-4)
