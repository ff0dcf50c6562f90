"""Forks, threads, collectors and compilers around a watched model."""

import gc
import os
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradscope.capture.guard import STEPS
from gradscope.capture.observer import Observer
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.log.reader import load


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(model: nn.Module, scope: Scope | None = None, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if scope is not None:
            scope.log(loss=loss)
    return losses


@pytest.mark.parametrize("log_dir", ["run", None])
def test_a_forked_child_trains_and_leaves_the_run_alone(
    log_dir: str | None, tmp_path: Path
) -> None:
    model = net()
    scope = watch(model, log_dir=log_dir and tmp_path / log_dir, every=1)
    train(model, scope)
    with warnings.catch_warnings():
        # The child trains on one thread, and ends at once.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            # More packets than the queue would hold.
            train(model, scope, steps=200)
            scope.close()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.05)
    assert ended[1] == 0
    train(model, scope)
    scope.close()
    assert scope.run().steps.tolist() == list(range(10))


def test_a_failure_leaves_no_hook_armed_and_nothing_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    scope = watch(model, log_dir=tmp_path, every=1)

    def fail(*_: object) -> None:
        message = "out of memory"
        raise RuntimeError(message)

    monkeypatch.setattr(Observer, "_read", fail)
    with pytest.warns(GradscopeWarning, match="out of memory"):
        train(model, scope, steps=50)
    observer = scope._observer
    assert observer._guard.is_disabled(STEPS)
    assert observer._open is None
    assert observer._pulses.known() == []
    # The permanent hooks of the root alone.
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    scope.close()


def test_what_changes_often_is_written_all_the_same(tmp_path: Path) -> None:
    model = net()
    scope = watch(model, log_dir=tmp_path, every=1)
    train(model, scope, steps=2)
    # An evaluation that logs again and again, and outlasts the two seconds.
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        scope.log(accuracy=0.5)
        time.sleep(0.1)
    assert load(tmp_path).steps.tolist() == [0, 1]
    scope.close()


def test_a_hand_written_step_is_written_though_nothing_follows(tmp_path: Path) -> None:
    model = net()
    scope = watch(model, log_dir=tmp_path, every=1)
    model(torch.randn(4, 6)).square().mean().backward()
    scope.step()
    deadline = time.monotonic() + 2
    while not load(tmp_path).steps.size and time.monotonic() < deadline:
        time.sleep(0.05)
    run = load(tmp_path)
    assert run.steps.tolist() == [0]
    assert (run.parameters["grad_norm"] > 0).all()
    scope.close()


def test_a_scope_that_is_dropped_closes_its_file_and_ends_its_thread(tmp_path: Path) -> None:
    model = net()
    scope = watch(model, log_dir=tmp_path, every=1)
    train(model, scope, steps=3)
    thread = scope._recorder._thread
    gone = weakref.ref(scope)
    del scope, model
    gc.collect()
    assert gone() is None
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert load(tmp_path).steps.size >= 2


def test_collection_on_the_recorders_own_thread_does_not_stop_it(tmp_path: Path) -> None:
    collected = threading.Event()

    def collect(_: object) -> None:
        gc.collect()
        collected.set()

    model = net()
    other = watch(net(), log_dir=tmp_path / "other")
    dropped = watch(model, log_dir=tmp_path / "dropped")
    train(model, dropped, steps=2)
    thread = dropped._recorder._thread
    other._recorder.call(collect)
    del dropped, model
    assert collected.wait(5)
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
    other.close()


def test_a_showwarning_of_the_users_that_raises_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        message = "no warnings here"
        raise RuntimeError(message)

    model = net()
    with watch(model, log_dir=tmp_path) as scope, warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", refuse)
        scope.log(text="not a number")  # type: ignore[arg-type]
        train(model, scope)
    assert scope.run().meta["problems"]


def test_tracing_a_watched_model_gives_what_it_gives_unwatched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 6)
    with warnings.catch_warnings():
        # Deprecated, and still in use.
        warnings.simplefilter("ignore")
        bare = torch.jit.trace(model, x)
        with watch(model, log_dir=tmp_path, every=1) as scope:
            traced = torch.jit.trace(model, x)
            train(model, scope)
    assert str(traced.graph).count("aten::") == str(bare.graph).count("aten::")
    run = scope.run()
    assert run.meta["problems"] == []
    assert run.steps.tolist() == list(range(5))


def test_exporting_a_watched_model_disables_nothing(tmp_path: Path) -> None:
    model = net()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        torch.export.export(model, (torch.randn(4, 6),))
        train(model, scope)
    assert scope.run().meta["problems"] == []
    assert scope.run().steps.tolist() == list(range(5))


def test_compiling_a_watched_model_breaks_no_graph(tmp_path: Path) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    model = net()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert isinstance(compiled, nn.Module)
        train(compiled, scope)
    assert len(graphs) == 1
    run = scope.run()
    assert (run.parameters["grad_norm"] > 0).all()
    assert run.meta["coverage"]["modules"]["never_ran"] == []
