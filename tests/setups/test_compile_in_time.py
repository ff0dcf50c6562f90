"""torch.compile before, during and after a watch: nothing is missed, left behind or broken."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture import compiled, statistics
from gradscope.capture.scope import watch
from gradscope.errors import GradscopeWarning
from tests.setups.compiling import (
    WAYS,
    Blocks,
    Eager,
    assert_equals_eager,
    batch,
    fresh,
    missed,
    regional,
    train,
    whole,
)
from tests.setups.support import support

# Torch's own.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


# When it was compiled, and what comes after.


@support(
    "torch.compile",
    "compiled, and run, before `watch`",
    parameters="right",
    outputs="right",
    output_gradients="right",
    note="it is compiled once more; of a function around the model, from the second step on",
)
@pytest.mark.parametrize(
    "way", ["whole", "whole, torch's class", "in place", "regional", "function"]
)
def test_what_ran_compiled_before_watch_is_seen(way: str, tmp_path: Path) -> None:
    """A graph without hooks would go on without them; a model around may see a step less."""
    build, compile_ = WAYS[way]
    model = fresh(build)
    forward = compile_(model, backend="aot_eager", fullgraph=True)
    train(model, forward, 1)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        train(model, forward, 3, lambda loss: scope.log(loss=loss))
        run = scope.run()
    coverage = run.meta["coverage"]["modules"]
    assert coverage["seen"] == coverage["expected"]
    twin = fresh(build)
    train(twin, twin, 1)
    eager = Eager(twin)
    train(twin, twin, 3, eager.step_ends)
    assert_equals_eager(run.modules, eager, but=[0])


@support(
    "torch.compile",
    "compiled in mid-training",
    parameters="right",
    outputs="right",
    output_gradients="right",
    note="outputs from the second recorded step on; it is compiled once more",
)
@pytest.mark.parametrize("way", ["whole", "in place", "regional", "function"])
def test_what_is_compiled_in_mid_training_is_seen(way: str, tmp_path: Path) -> None:
    build, compile_ = WAYS[way]
    model = fresh(build)
    with watch(model, log_dir=tmp_path, every=2) as scope:
        train(model, model, 3, lambda loss: scope.log(loss=loss))
        forward = compile_(model, backend="aot_eager", fullgraph=True)
        train(model, forward, 5, lambda loss: scope.log(loss=loss))
        run = scope.run()
    assert run.meta["coverage"]["forwards"] == 8
    twin = fresh(build)
    eager = Eager(twin)
    train(twin, twin, 3, eager.step_ends)
    train(twin, twin, 5, eager.step_ends)
    # Step 4 found graphs that were made in step 3, without hooks.
    assert_equals_eager(run.modules, eager, but=[2])


def test_a_part_that_is_called_by_itself(tmp_path: Path) -> None:
    """As GANs do: the model's own forward never runs."""
    model = fresh(Blocks)
    model.compile(backend="aot_eager")
    holder = nn.ModuleDict({"net": model})
    with watch(holder, log_dir=tmp_path, every=1) as scope:
        train(model, model, 4, lambda loss: scope.log(loss=loss))
        run = scope.run()
    assert run.steps.tolist() == [0, 1, 2, 3]
    column = run.modules.names.index("net.head")
    assert (run.modules["output_grad_rms"][2:, column] > 0).all()


def test_watched_closed_and_watched_again(tmp_path: Path) -> None:
    model = fresh(Blocks)
    forward = whole(model, backend="aot_eager", fullgraph=True)
    train(model, forward, 1)
    before = [sorted(vars(module)) for module in model.modules()]
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        with watch(model, log_dir=folder, every=1) as scope:
            train(model, forward, 2, lambda loss: scope.log(loss=loss))
            run = scope.run()
        # The first step found graphs without hooks.
        assert (run.modules["output_grad_rms"][1] > 0).all(), attempt
        assert [sorted(vars(module)) for module in model.modules()] == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        # What is left in a graph tells nobody.
        train(model, forward, 1)


def test_scope_and_model_are_not_kept_alive(tmp_path: Path) -> None:
    model = fresh(Blocks)
    forward = whole(model, backend="aot_eager")
    with watch(model, log_dir=tmp_path, every=1) as scope:
        train(model, forward, 2)
    gone = weakref.ref(model), weakref.ref(scope)
    del model, forward, scope
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_no_tensor_of_a_graph_is_kept_alive(tmp_path: Path) -> None:
    """Neither what modules return, nor a graph whose backward never comes."""
    kept: list[weakref.ref[Tensor]] = []
    model = fresh(Blocks)
    forward = regional(model, backend="aot_eager", fullgraph=True)
    model.get_submodule("layers.1").register_forward_hook(
        lambda *seen: kept.append(weakref.ref(seen[2]))
    )
    with watch(model, log_dir=tmp_path, every=1):
        train(model, forward, 2)
        forward(batch(0)[0])
        gc.collect()
        assert len(kept) == 3
        assert [reference() for reference in kept] == [None] * 3


def _pickled(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301  (its own bytes)
    assert isinstance(copied, nn.Module)
    return copied


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied = torch.load(buffer, weights_only=False)
    assert isinstance(copied, nn.Module)
    return copied


@pytest.mark.parametrize("copied_by", [copy.deepcopy, _pickled, _saved])
def test_copies_are_unseen(copied_by: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = fresh(Blocks)
    keys = list(model.state_dict())
    forward = whole(model, backend="aot_eager", fullgraph=True)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        train(model, forward, 2, lambda loss: scope.log(loss=loss))
        assert list(model.state_dict()) == keys
        copied = copied_by(model)
        assert [sorted(vars(m)) for m in copied.modules()] == [
            sorted(vars(m)) for m in model.modules()
        ]
        train(copied, whole(copied, backend="aot_eager", fullgraph=True), 3)
        train(copied, copied, 1)
        run = scope.run()
    assert run.steps.tolist() == [0, 1]
    assert missed(run) == []


# What goes wrong.


def test_an_error_in_an_op_disables_outputs_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = fresh(Blocks)
    expected = train(bare, whole(bare, backend="aot_eager"), 3)

    def fail(_: Tensor) -> Tensor:
        message = "no statistics today"
        raise RuntimeError(message)

    model = fresh(Blocks)
    forward = whole(model, backend="aot_eager", fullgraph=True)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        monkeypatch.setattr(statistics, "active_units", lambda *_: fail(_[0]))
        with pytest.warns(GradscopeWarning, match="no statistics today"):
            found = train(model, forward, 3, lambda loss: scope.log(loss=loss))
        run = scope.run()
    assert found.same_bits(expected)
    assert run.steps.tolist() == [0, 1, 2]
    assert (run.parameters["grad_norm"] > 0).all()


@support(
    "torch.compile",
    "torch before 2.13",
    outputs="unknown",
    output_gradients="unknown",
    note="parameters alone are recorded, which is said aloud",
)
@pytest.mark.parametrize("way", ["whole, torch's class", "whole", "regional"])
def test_a_torch_without_the_means_records_parameters_and_says_so(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_define_ops", lambda: False)
    build, compile_ = WAYS[way]
    model = fresh(build)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        forward = compile_(model, backend="aot_eager", fullgraph=True)
        with pytest.warns(GradscopeWarning, match="their outputs are not") as said:
            train(model, forward, 3, lambda loss: scope.log(loss=loss))
        run = scope.run()
    assert len(said) == 1
    assert (run.parameters["grad_norm"] > 0).all()


def test_exported_programs_have_nothing_of_ours(tmp_path: Path) -> None:
    model = fresh(Blocks)
    x = batch(0)[0]
    for strict in (True, False):
        bare = torch.export.export(model, (x,), strict=strict)
        with watch(model, log_dir=tmp_path / str(strict), every=1) as scope:
            train(model, whole(model, backend="aot_eager"), 2, lambda loss: scope.log(loss=loss))
            exported = torch.export.export(model, (x,), strict=strict)
            assert missed(scope.run()) == []
        assert [n.target for n in exported.graph.nodes] == [n.target for n in bare.graph.nodes]


def test_a_compiled_optimizer(tmp_path: Path) -> None:
    model = fresh(Blocks)
    optimizer = SGD(model.parameters(), lr=0.05)
    step = torch.compile(optimizer.step, backend="aot_eager")
    forward = whole(model, backend="aot_eager")
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(3):
            x, y = batch(number)
            F.cross_entropy(forward(x), y).backward()
            step()
            optimizer.zero_grad()
            scope.log(loss=1.0)
        run = scope.run()
    assert run.steps.tolist() == [0, 1, 2]
    assert (run.parameters["grad_norm"] > 0).all()
    assert (run.modules["output_grad_rms"] > 0).all()
