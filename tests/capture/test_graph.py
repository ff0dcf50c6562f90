"""The autograd graph of the loss, taken once: against graphs written down by hand."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from gradscope.log.reader import load
from tests.capture.trainings import sgd

Graph = dict[str, Any]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def leaf(name: str, *shape: int) -> Graph:
    return {
        "op": "AccumulateGrad",
        "inputs": [],
        "shapes": [list(shape)],
        "saved": {},
        "parameter": name,
    }


def linear(inputs: list[int], rows: int, given: int, out: int) -> Graph:
    saved = {
        "alpha": 1,
        "beta": 1,
        "mat1_sym_sizes": [rows, given],
        "mat2_sym_sizes": [given, out],
    }
    return {"op": "AddmmBackward0", "inputs": inputs, "shapes": [[rows, out]], "saved": saved}


def node(op: str, inputs: list[int], shape: list[int], **saved: object) -> Graph:
    return {"op": op, "inputs": inputs, "shapes": [shape], "saved": saved}


# Of `two_layers` with five samples, from its output on: breadth-first, the first node is 1.
LAYERS = [
    linear([2, 3, 4], 5, 4, 2),
    leaf("2.bias", 2),
    node("ReluBackward0", [5], [5, 4]),
    node("TBackward0", [6], [4, 2]),
    linear([7, -1, 8], 5, 3, 4),
    leaf("2.weight", 2, 4),
    leaf("0.bias", 4),
    node("TBackward0", [9], [3, 4]),
    leaf("0.weight", 4, 3),
]
MSE = node("MseLossBackward0", [1, -1], [], reduction=1)


class WithLoss(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.layers = two_layers()
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor) -> object:
        out = self.layers(x)
        return self.wrap(out, F.mse_loss(out, y))


def ops(graph: Graph) -> list[str]:
    return [found["op"] for found in graph["nodes"]]


@pytest.mark.parametrize("way", ["before", "after backward", "after step", "run between", "module"])
def test_loss_is_followed_to_the_parameters(way: str, tmp_path: Path) -> None:
    model = two_layers()
    optimizer = sgd(model)
    mse = nn.MSELoss()
    with watch(
        model, optimizer, mse if way == "module" else None, log_dir=tmp_path, every=1
    ) as scope:
        loss = mse(model(torch.ones(5, 3)), torch.zeros(5, 2))
        if way == "before":
            scope.log(loss=loss)
        loss.backward()
        if way == "after backward":
            scope.log(loss=loss)
        optimizer.step()
        if way == "run between":
            # It closes the step: until then the output had to do.
            assert scope.run().meta["graph"]["root"] == "output"
        if way in {"run between", "after step"}:
            scope.log(loss=loss)
    graph = load(tmp_path).meta["graph"]
    assert graph == {
        "step": 0,
        "root": "loss",
        "nodes": [MSE, *LAYERS],
        "output": 1,
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda _, loss: loss, None),
        (lambda out, loss: {"loss": loss, "logits": out}, 1),
        (lambda out, loss: type("Result", (), {"loss": loss, "logits": out})(), None),
    ],
    ids=["0-d output", "mapping", "attribute"],
)
def test_loss_that_the_model_returns(
    wrap: Callable[..., object], output: int | None, tmp_path: Path
) -> None:
    model = WithLoss(wrap)
    with watch(model, sgd(model), log_dir=tmp_path, every=1):
        model(torch.ones(5, 3), torch.zeros(5, 2))
    # The step was never finished: its loss was there all the same.
    graph = load(tmp_path).meta["graph"]
    expected = [
        {**found, "parameter": f"layers.{found['parameter']}"} if "parameter" in found else found
        for found in LAYERS
    ]
    assert graph["nodes"] == [MSE, *expected]
    assert (graph["root"], graph["output"]) == ("loss", output)


def test_output_has_to_do_where_no_loss_is_seen_and_a_later_loss_counts(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for step in range(4):
            loss = F.mse_loss(model(torch.ones(5, 3)), torch.zeros(5, 2))
            loss.backward()
            if step == 1:
                scope.log(loss=float(loss.detach()))
                first = scope.run().meta["graph"]
            if step >= 2:
                scope.log(loss=loss)
            optimizer.step()
    moved = [{**n, "inputs": [i - (i > 0) for i in n["inputs"]]} for n in LAYERS]
    assert first == {"step": 0, "root": "output", "nodes": moved, "output": 0, "truncated": False}
    last = load(tmp_path).meta["graph"]
    assert (last["step"], last["root"], last["nodes"]) == (2, "loss", [MSE, *LAYERS])


def test_first_micro_batch_counts(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = sgd(model)
    with watch(model, optimizer, nn.MSELoss(), log_dir=tmp_path, every=1) as scope:
        losses = [nn.MSELoss(), nn.L1Loss()]
        for rows, criterion in zip((5, 7), losses, strict=True):
            loss = criterion(model(torch.ones(rows, 3)), torch.zeros(rows, 2))
            scope.log(loss=loss)
            loss.backward()
        optimizer.step()
    assert load(tmp_path).meta["graph"]["nodes"] == [MSE, *LAYERS]


def test_what_needs_no_gradient_and_what_holds_no_number(tmp_path: Path) -> None:
    model = two_layers()
    model[0].requires_grad_(requires_grad=False)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        bounded = F.hardtanh(model(torch.ones(5, 3)), -torch.inf, 9.0)
        loss = F.nll_loss(F.log_softmax(bounded, -1), torch.arange(5) % 2)
        loss.backward()
        optimizer.step()
        scope.log(loss=loss)
    graph = load(tmp_path).meta["graph"]
    found = dict(zip(ops(graph), graph["nodes"], strict=True))
    assert found["NllLossBackward0"]["saved"] == {"ignore_index": -100, "reduction": 1}
    # As the user gave it.
    assert found["LogSoftmaxBackward0"]["saved"] == {"dim": -1}
    # JSON has no infinity.
    assert found["HardtanhBackward0"]["saved"] == {"min_val": "-inf", "max_val": 9.0}
    # The frozen layer's output is an argument that needs no gradient.
    addmm = found["AddmmBackward0"]
    assert addmm["inputs"][1] == -1
    assert [n["parameter"] for n in graph["nodes"] if "parameter" in n] == ["2.bias", "2.weight"]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = Mark()
        marks.append(weakref.ref(ctx.mark))
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0] * 2


def doubled(x: Tensor) -> Tensor:
    out: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
    return out


class Mark:
    """Goes with the node that holds it."""


marks: list["weakref.ref[Mark]"] = []


def test_nothing_keeps_the_graph_alive(tmp_path: Path) -> None:
    marks.clear()
    model = two_layers()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        out = doubled(model(torch.ones(5, 3)))
        loss = out.square().mean()
        loss.backward()
        scope.log(loss=loss)
        assert marks[0]() is not None
        gone = weakref.ref(out)
        del out, loss
        gc.collect()
        # Before the step has closed.
        assert marks[0]() is None
        assert gone() is None
        optimizer.step()
    assert "DoubledBackward" in ops(load(tmp_path).meta["graph"])


def test_graph_of_an_output_is_not_kept_either(tmp_path: Path) -> None:
    marks.clear()
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_forward_hook(lambda _, __, out: doubled(out))
    with watch(model, sgd(model), log_dir=tmp_path, every=1):
        model(torch.ones(5, 3))
        gc.collect()
        assert marks[0]() is None


def test_no_saved_tensor_is_unpacked(tmp_path: Path) -> None:
    """They may lie on disk, or be freed."""
    unpacked = []

    def unpack(packed: Tensor) -> Tensor:
        unpacked.append(packed)
        return packed

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 2)
    )
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = F.cross_entropy(model(torch.randn(5, 3, 6, 6)), torch.zeros(5).long())
        scope.log(loss=loss)
        assert unpacked == []
        loss.backward()
        assert unpacked != []
        optimizer.step()
    graph = load(tmp_path).meta["graph"]
    convolution = next(n for n in graph["nodes"] if n["op"] == "ConvolutionBackward0")
    assert convolution["saved"]["stride"] == [1, 1]
    assert convolution["shapes"] == [[5, 4, 4, 4]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segment(reentrant: bool, tmp_path: Path) -> None:
    class Segmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, self.first(x), use_reentrant=reentrant)
            return out

    model = Segmented()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        loss = model(torch.ones(5, 3)).sum()
        loss.backward()
        scope.log(loss=loss)
        optimizer.step()
    graph = load(tmp_path).meta["graph"]
    names = {n["parameter"] for n in graph["nodes"] if "parameter" in n}
    assert ("CheckpointFunctionBackward" in ops(graph)) is reentrant
    # What a re-entrant one runs is in no graph before the backward.
    inner = set() if reentrant else {"inner.weight", "inner.bias"}
    assert names == {"first.weight", "first.bias"} | inner


def test_large_graph_is_cut_and_small_on_disk(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        out = model(torch.ones(5, 3))
        for step in range(1500):
            out = torch.tanh(out * (step + 2) + torch.nn.functional.layer_norm(out, (3,)))
        loss = out.sum()
        before = sum(path.stat().st_size for path in tmp_path.iterdir())
        scope.log(loss=loss)
        scope._recorder.flush()
        written = sum(path.stat().st_size for path in tmp_path.iterdir()) - before
        loss.backward()
        optimizer.step()
    graph = load(tmp_path).meta["graph"]
    assert graph["truncated"] is True
    assert len(graph["nodes"]) == 4_000
    assert max(max(n["inputs"], default=0) for n in graph["nodes"]) == 3_999
    assert 4_000 < written < 200_000


def test_resumed_run_keeps_its_graph(tmp_path: Path) -> None:
    for rows in (5, 7):
        model = two_layers()
        optimizer = sgd(model)
        with watch(model, optimizer, log_dir=tmp_path, every=1, resume=True) as scope:
            loss = F.mse_loss(model(torch.ones(rows, 3)), torch.zeros(rows, 2))
            loss.backward()
            scope.log(loss=loss)
            optimizer.step()
    run = load(tmp_path)
    assert list(run.steps) == [0, 1]
    assert run.meta["graph"]["nodes"] == [MSE, *LAYERS]


def test_compiled_model_is_one_node(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            loss = F.mse_loss(compiled(torch.ones(5, 3)), torch.zeros(5, 2))
            loss.backward()
            scope.log(loss=loss)
            optimizer.step()
        run = scope.run()
    graph = run.meta["graph"]
    assert ops(graph)[:2] == ["MseLossBackward0", "CompiledFunctionBackward"]
    names = {n["parameter"] for n in graph["nodes"] if "parameter" in n}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    # What goes in and comes out is known as in eager mode.
    for name, value in (("input", torch.ones(5, 3)), ("output", None)):
        row = run.signals.names.index(name)
        if value is not None:
            assert run.signals["max"][0, row] == 1
        assert list(run.signals["sample_std"][:, row]) == pytest.approx([0, 0], abs=1e-6)
        assert run.signals["repeated"][1, row] == float(name == "input")
