"""Where the gradient along time can't be measured, and what is kept to measure it."""

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from gradscope.capture import recurrent
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.record import Run
from tests.setups.recurrences import along_time, both, state
from tests.setups.recurrent_nets import (
    FEATURES,
    UNITS,
    Net,
    assert_along_time,
    batch,
    classifier,
    is_unmeasured,
    net,
    one_step,
    said,
    update,
)
from tests.setups.support import support

# Where it can't be measured, it says so.


def after_the_backward(change: Callable[[Net, Tensor], None]) -> Run:
    model, x = net(), batch()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        model(x).backward()
        change(model, x)
        optimizer.step()
        return scope.run()


def nudge(model: Net, x: Tensor) -> None:
    del x
    with torch.no_grad():
        dict(model.rnn.named_parameters())["bias_hh_l0"].add_(1.0)


CHANGES: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "nothing": (lambda _m, _x: None, ""),
    "input": (lambda _, x: x.mul_(2), "its input was changed in place"),
    "weights": (nudge, "its weights changed"),
    "mode": (lambda model, _: model.eval(), "from train() to eval()"),
    "another weight": (
        lambda model, _: setattr(model.rnn, "bias_hh_l0", nn.Parameter(torch.ones(4 * UNITS))),
        "its weights changed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_before_the_step_is_not_measured(name: str) -> None:
    change, message = CHANGES[name]
    run = after_the_backward(change)
    assert is_unmeasured(run) == bool(message)
    assert message in said(run)


class Doubling(Net):
    """Changes the recurrent layer's output in place."""

    def forward(self, x: Any, *_: Any) -> Tensor:
        out, h = self.rnn(x)
        return self.loss(out.mul_(2), h)


@pytest.mark.parametrize("mode", ["tanh", "relu", "gru"])
def test_an_output_changed_in_place(mode: str) -> None:
    """Not of an LSTM: there torch refuses."""
    model, x = Doubling(net(mode).rnn, both), batch()
    (expected,) = along_time(model.rnn, list(x), lambda o, h, c: both(o * 2, h, c))
    assert_along_time(one_step(model, x), expected)


def test_an_output_changed_in_place_whose_gradient_may_have_been_missed() -> None:
    run = one_step(Doubling(net("gru").rnn, state), batch())
    assert is_unmeasured(run)
    assert "its output was changed in place" in said(run)


@support("Recurrent nets", "along time: `create_graph`", output_gradients="unknown")
def test_a_gradient_of_a_gradient() -> None:
    model, x = net(), batch().requires_grad_()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        (gradient,) = torch.autograd.grad(model(x), x, create_graph=True)
        gradient.square().sum().backward()
        optimizer.step()
        run = scope.run()
    assert is_unmeasured(run)
    assert "create_graph" in said(run)


@support("Recurrent nets", "along time: parametrized weights", output_gradients="unknown")
def test_weights_that_a_parametrization_makes() -> None:
    """Spectral norm goes on with each computation of the weights."""

    class Listed(Net):
        def __init__(self) -> None:
            super().__init__(nn.LSTM(FEATURES, UNITS, batch_first=True))
            parametrizations.spectral_norm(self.rnn, "weight_hh_l0")
            self.layers = nn.ModuleList([self.rnn])

    def make() -> Net:
        torch.manual_seed(0)
        return Listed()

    model, twin = make(), make()
    tensors = []
    for each in (model, twin):
        optimizer = SGD(each.parameters(), lr=0.1)
        scope = watch(each, optimizer, every=1) if each is model else None
        for _ in range(3):
            update(each, optimizer, batch())
        if scope is not None:
            run = scope.run()
            scope.close()
        tensors.append([*each.parameters(), *each.buffers()])
    assert is_unmeasured(run)
    assert "parametrized" in said(run)
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@support("Recurrent nets", "along time: a forward of one's own", output_gradients="unknown")
def test_a_forward_of_the_users() -> None:
    class Counting(nn.LSTM):
        calls = 0

        def forward(self, *args: Any) -> Any:
            self.calls += 1
            return super().forward(*args)

    rnn = Counting(FEATURES, UNITS, batch_first=True)
    run = one_step(Net(rnn), batch())
    assert rnn.calls == 1
    assert is_unmeasured(run)
    assert "not torch's own" in said(run)


def test_reentrant_checkpoint_and_transforms_are_left_alone() -> None:
    class Saved(Net):
        def forward(self, x: Any, *_: Any) -> Tensor:
            return self.loss(*checkpoint(self.rnn, x, use_reentrant=True))

    run = one_step(Saved(net().rnn), batch().requires_grad_())
    assert is_unmeasured(run)
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        torch.func.grad(model)(batch())
        weights = {name: p * 1.0 for name, p in model.named_parameters()}
        torch.func.functional_call(model, weights, (batch(),)).backward()
        optimizer.step()
        parts = [p["part"] for p in scope.run().meta["problems"]]
        # That what the transform runs is not recorded.
        assert parts[0] == "module outputs"
        assert parts[1:] in ([], ["gradients along time"])


def test_a_failure_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        message = "no memory"
        raise MemoryError(message)

    monkeypatch.setattr(recurrent, "input_gradients", fail)
    model = net()
    with pytest.warns(GradscopeWarning, match="gradients along time disabled") as caught:
        run = one_step(model, batch())
    assert len(caught) == 1
    assert is_unmeasured(run)
    assert np.isfinite(run.modules["output_grad_norm"][0, run.modules.names.index("rnn")])
    assert np.isfinite(run.parameters["grad_norm"]).all()


def test_a_failing_forward_gives_the_random_numbers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1):
        loss = model(batch())
        loss.backward()
        before = torch.get_rng_state()
        monkeypatch.setattr(nn.LSTM, "check_forward_args", lambda *_: 1 / 0)
        with pytest.warns(GradscopeWarning, match="ZeroDivisionError"):
            optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


# Memory.


def kept_alive(scope: Scope, model: nn.Module, optimizer: Optimizer, end: str) -> bool:
    """Whether the input is alive once the step ended in this way."""
    x = batch()
    storage = weakref.ref(x.untyped_storage())
    loss = model(x)
    if end != "no backward":
        loss.backward()
    del x, loss
    if end in {"step", "again"}:
        optimizer.step()
    elif end == "close":
        scope.close()
    else:
        # The next step begins.
        update(model, optimizer, batch(seed=2))
    if end == "again":
        update(model, optimizer, batch(seed=2))
    gc.collect()
    return storage() is not None


@pytest.mark.parametrize("end", ["step", "again", "no backward", "close"])
def test_nothing_of_the_users_is_kept_after_the_step(end: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        assert not kept_alive(scope, model, optimizer, end)


def test_of_micro_batches_one_is_kept() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    alive: list[weakref.ref[Any]] = []
    most = 0
    with watch(model, optimizer, every=1):
        for number in range(8):
            x = batch(seed=number)
            alive.append(weakref.ref(x.untyped_storage()))
            model(x).backward()
            del x
            gc.collect()
            most = max(most, sum(each() is not None for each in alive))
        optimizer.step()
    assert most == 1


def test_forwards_without_a_backward_do_not_pile_up() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    alive: list[weakref.ref[Any]] = []
    with watch(model, optimizer, every=1) as scope:
        for number in range(40):
            x = batch(seed=number)
            alive.append(weakref.ref(x.untyped_storage()))
            model(x)
            del x
        gc.collect()
        assert sum(each() is not None for each in alive) <= 16
        update(model, optimizer, batch())
        assert "forwards before a backward" in said(scope.run())


def test_the_log_has_it(tmp_path: Path) -> None:
    run = one_step(net(), batch(), log_dir=tmp_path)
    frame = run.modules.frame("time_grad_first")
    assert frame.shape[0] == 1
    assert math.isfinite(frame["rnn"].iloc[0])
