"""The gradient along time in the steps of a training, which it leaves as they are."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import weight_norm
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from tests.setups.recurrences import AlongTime, along_time, both, last
from tests.setups.recurrent_nets import (
    BATCH,
    ENDS,
    FEATURES,
    STEPS,
    UNITS,
    Net,
    assert_along_time,
    batch,
    classifier,
    is_unmeasured,
    merged,
    net,
    numbers,
    one_step,
    recurrent_weight,
    update,
)
from tests.setups.support import support

# What training does stays as it is.


def calls_of_hooks(model: nn.Module) -> list[str]:
    """The user's own hooks write down each of their calls."""
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, n=name: calls.append(f"{n} before"))
        module.register_forward_hook(lambda *_, n=name: calls.append(f"{n} after"))
        module.register_full_backward_hook(lambda *_, n=name: calls.append(f"{n} back"))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, n=name: calls.append(f"{n} gradient"))
        parameter.register_post_accumulate_grad_hook(
            lambda _, n=name: calls.append(f"{n} accumulated")
        )
    return calls


def trained(model: nn.Module, *, watched: bool) -> tuple[list[Tensor], list[str]]:
    calls = calls_of_hooks(model)
    optimizer = Adam(model.parameters(), lr=0.01)
    scope = watch(model, optimizer, every=1) if watched else None
    torch.manual_seed(100)
    for number in range(25):
        update(model, optimizer, batch(seed=number))
    if scope is not None:
        run = scope.run()
        scope.close()
        assert np.isfinite(run.modules["time_grad_first"][[0, 10, 20]]).any(axis=1).all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *gradients, torch.get_rng_state()], calls


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": classifier,
    "directions": lambda: net("gru", both, bidirectional=True),
    "old weight norm": lambda: Net(weight_norm(net().rnn, "weight_hh_l0")),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", MODELS)
def test_training_does_not_change(name: str) -> None:
    tensors, calls = trained(MODELS[name](), watched=True)
    expected, expected_calls = trained(MODELS[name](), watched=False)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert calls == expected_calls


@support(
    "Recurrent nets",
    "along time: dropout between layers",
    output_gradients="right",
    note="on the CPU; elsewhere unknown",
)
def test_dropout_between_layers_is_the_one_of_the_forward() -> None:
    model = classifier()
    twin = copy.deepcopy(model)
    x = batch()
    torch.manual_seed(3)
    arrived: list[Tensor] = []
    hidden = twin.embed(x)
    hidden.register_hook(arrived.append)
    out = twin.rnn(hidden)[0]
    twin.head(twin.drop(out[:, -1])).square().mean().backward()
    norms = [float(arrived[0][:, at].norm()) for at in (0, STEPS // 2, STEPS - 1)]
    torch.manual_seed(3)
    assert_along_time(one_step(model, x), AlongTime(*norms))


def test_in_evaluation_mode_there_is_no_dropout() -> None:
    model = classifier().eval()
    (expected,) = along_time(
        model.rnn,
        list(model.embed(batch()).detach()),
        lambda out, _h, _c: (
            nn.functional.linear(out[:, -1], model.head.weight.double(), model.head.bias.double())
            .square()
            .mean()
        ),
    )
    assert_along_time(one_step(model, batch()), expected)


def test_a_model_that_is_a_recurrent_layer_itself() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(FEATURES, UNITS, 2, batch_first=True, dropout=0.5)
    twin, x = copy.deepcopy(model), batch()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    twin(leaf)[0][:, -1].square().sum().backward()
    assert leaf.grad is not None
    norms = [float(leaf.grad[:, at].norm()) for at in (0, STEPS // 2, STEPS - 1)]
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        torch.manual_seed(3)
        model(x)[0][:, -1].square().sum().backward()
        optimizer.step()
        assert_along_time(scope.run(), AlongTime(*norms), "(root)")


# Steps and micro-batches.


def test_rare() -> None:
    """The first recorded step, and every tenth recorded one after it."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=3) as scope:
        for number in range(66):
            update(model, optimizer, batch(seed=number))
        run = scope.run()
    known = np.isfinite(run.modules["time_grad_last"]).any(axis=1)
    assert list(run.modules.steps[known]) == [0, 30, 60]


@support("Recurrent nets", "along time: accumulation", output_gradients="right")
def test_micro_batches_count_as_one_sample() -> None:
    model = net(read=both)
    optimizer = SGD(model.parameters(), lr=0.1)
    xs = [batch(seed=1), batch(2, STEPS, FEATURES, seed=2), batch(seed=3)]
    expected = merged([along_time(model.rnn, list(x), both)[0] for x in xs])
    for after_all in (False, True):
        with watch(model, optimizer, every=1) as scope:
            if after_all:
                torch.stack([model(x) for x in xs]).sum().backward()
            else:
                for x in xs:
                    model(x).backward()
            with torch.no_grad():
                weights = [p.clone() for p in model.parameters()]
            optimizer.step()
            with torch.no_grad():
                for parameter, weight in zip(model.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            assert_along_time(scope.run(), expected)


def test_several_uses_in_a_forward_have_each_their_own() -> None:
    class Twice(Net):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            return self.loss(*self.rnn(x)) + self.loss(*self.rnn(x * 2)) / 2

    torch.manual_seed(0)
    model, x = Twice(nn.GRU(FEATURES, UNITS, batch_first=True), both), batch()
    (first,) = along_time(model.rnn, list(x), both)
    (second,) = along_time(model.rnn, list(x * 2), lambda o, h, c: both(o, h, c) / 2)
    run = one_step(model, x)
    assert_along_time(run, first)
    assert_along_time(run, second, "rnn#1")


def test_several_backwards_add_up() -> None:
    model, x = net(), batch()
    (expected,) = along_time(model.rnn, list(x), lambda o, h, c: 3 * last(o, h, c))
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as scope:
        loss = model(x)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        optimizer.step()
        assert_along_time(scope.run(), expected)


@pytest.mark.parametrize("given", [True, False], ids=["scaler given", "not given"])
def test_under_a_grad_scaler(given: bool) -> None:
    model, x = net(), batch()
    (expected,) = along_time(model.rnn, list(x), last)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=1000.0)
    with watch(model, optimizer, every=1, scaler=scaler if given else None) as scope:
        scaler.scale(model(x)).backward()
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    if given:
        assert_along_time(run, expected)
    else:
        assert_along_time(run, AlongTime(*(1000 * getattr(expected, end) for end in ENDS)))
        assert any(
            "multiplied by the GradScaler's scale" in p["message"] for p in run.meta["problems"]
        )


def test_after_a_skipped_step_the_next_is_measured() -> None:
    model = net()
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=4.0)
    with watch(model, optimizer, every=1, scaler=scaler) as scope:
        for number in range(3):
            optimizer.zero_grad()
            scaler.scale(model(batch())).backward()
            if number == 0:
                gradient = recurrent_weight(model).grad
                assert gradient is not None
                gradient[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        run = scope.run()
    assert [is_unmeasured(run, row=row) for row in range(3)] == [True, False, True]


@support("Recurrent nets", "along time: autocast", output_gradients="right")
def test_under_autocast() -> None:
    model, x = net("tanh"), batch()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(model(leaf), leaf)
    norms = [float(gradient[:, at].double().norm()) for at in (0, STEPS // 2, STEPS - 1)]
    optimizer = SGD(model.parameters(), lr=0.1)
    (exact,) = along_time(model.rnn, list(x), last)
    with watch(model, optimizer, every=1) as scope:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()
        optimizer.step()
        run = scope.run()
    assert_along_time(run, AlongTime(*norms), rtol=1e-6)
    # It is bfloat16's, and not what it would be without.
    assert numbers(run)["grad_last"] != pytest.approx(exact.last, rel=5e-6)


def test_frozen_layers_and_keywords() -> None:
    class Around(Net):
        def __init__(self) -> None:
            super().__init__(nn.LSTM(FEATURES, UNITS, batch_first=True), both)
            self.before = nn.Linear(FEATURES, FEATURES)
            self.rnn.requires_grad_(requires_grad=False)

        def forward(self, x: Tensor, *_: Any) -> Tensor:
            start = (torch.ones(1, len(x), UNITS), torch.ones(1, len(x), UNITS))
            return self.loss(*self.rnn(input=self.before(x), hx=start))

    torch.manual_seed(0)
    model, x = Around(), batch()
    ones = torch.ones(1, BATCH, UNITS)
    (expected,) = along_time(model.rnn, list(model.before(x).detach()), both, [ones, ones])
    assert_along_time(one_step(model, x), expected)


def test_checkpointed_without_reentry() -> None:
    class Saved(Net):
        def forward(self, x: Any, *_: Any) -> Tensor:
            return self.loss(*checkpoint(self.rnn, x, use_reentrant=False))

    model, x = net(), batch()
    (expected,) = along_time(model.rnn, list(x), last)
    run = one_step(Saved(model.rnn), x)
    assert_along_time(run, expected)


def test_an_optimizer_in_the_backward() -> None:
    model, twin = classifier(dropout=0.0), classifier(dropout=0.0)
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    arrived: list[Tensor] = []
    torch.manual_seed(3)
    hidden = twin.embed(batch())
    hidden.register_hook(arrived.append)
    twin.head(twin.drop(twin.rnn(hidden)[0][:, -1])).square().mean().backward()
    norms = [float(arrived[0][:, at].norm()) for at in (0, STEPS // 2, STEPS - 1)]
    with watch(model, list(optimizers.values()), every=1) as scope:
        torch.manual_seed(3)
        model(batch()).backward()
        assert_along_time(scope.run(), AlongTime(*norms))
