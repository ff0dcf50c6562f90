"""The gradient along time of fused recurrent layers, against recurrences by hand in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from tests.setups.recurrences import READS, Loss, along_time, both, every, last, state
from tests.setups.recurrent_nets import (
    FEATURES,
    MODES,
    STEPS,
    UNITS,
    Net,
    assert_along_time,
    batch,
    input_gradient,
    net,
    numbers,
    one_step,
    recurrent_weight,
    said,
)
from tests.setups.support import support


@support(
    "Recurrent nets",
    "along time: `nn.RNN`, `nn.LSTM`, `nn.GRU`",
    output_gradients="right",
    note="on the first recorded step, and every tenth recorded one after it",
)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mode", MODES)
def test_total_gradient_at_the_first_middle_and_last_step(mode: str, read: str) -> None:
    model, x = net(mode, READS[read]), batch()
    (expected,) = along_time(model.rnn, list(x), model.read)
    run = one_step(model, x)
    assert_along_time(run, expected)
    assert numbers(run)["steps"] == STEPS
    assert said(run) == ""


OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"num_layers": 3},
    "time first": {"batch_first": False},
    "no bias": {"bias": False},
    "double": {"dtype": torch.float64},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
def test_settings(option: str, mode: str) -> None:
    model, x = net(mode, both, **OPTIONS[option]), batch()
    (expected,) = along_time(model.rnn, list(x), both)
    given = x.to(OPTIONS[option].get("dtype", torch.float32))
    run = one_step(model, given if model.rnn.batch_first else given.transpose(0, 1))
    assert_along_time(run, expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projection() -> None:
    model, x = net(read=both, proj_size=2, num_layers=2, bidirectional=True), batch()
    forward, reverse = along_time(model.rnn, list(x), both)
    run = one_step(model, x)
    assert_along_time(run, forward)
    assert_along_time(run, reverse, "rnn#reverse")


@support("Recurrent nets", "along time: bidirectional", output_gradients="right")
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_each_direction_in_the_order_it_reads(mode: str, layers: int, read: str) -> None:
    model = net(mode, READS[read], bidirectional=True, num_layers=layers)
    x = batch()
    forward, reverse = along_time(model.rnn, list(x), model.read)
    run = one_step(model, x)
    assert_along_time(run, forward)
    assert_along_time(run, reverse, "rnn#reverse")
    assert numbers(run, "rnn#reverse")["steps"] == STEPS


@support("Recurrent nets", "along time: packed sequences", output_gradients="right")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("read", [every, state, both])
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_have_their_own_middle_and_end(
    mode: str, read: Loss, bidirectional: bool
) -> None:
    model = net(mode, read, bidirectional=bidirectional, num_layers=2)
    xs = [batch(length, FEATURES, seed=length) for length in (3, 6, 1, 6)]
    expected = along_time(model.rnn, xs, read)
    run = one_step(model, pack_sequence(xs, enforce_sorted=False))
    for name, direction in zip(("rnn", "rnn#reverse"), expected, strict=False):
        assert_along_time(run, direction, name)
    assert numbers(run)["steps"] == 6


@pytest.mark.parametrize("mode", MODES)
def test_given_states_and_one_sequence_without_a_batch(mode: str) -> None:
    model = net(mode, both)
    x = batch(STEPS, FEATURES)
    parts = [batch(1, UNITS, seed=7), batch(1, UNITS, seed=8)][: 2 if mode == "lstm" else 1]
    hidden = tuple(parts) if mode == "lstm" else parts[0]
    (expected,) = along_time(model.rnn, [x], both, [part[:, None] for part in parts])
    assert_along_time(one_step(model, x, hidden), expected)


def test_time_steps_without_influence_count_as_zeros() -> None:
    model, x = net("relu"), batch()
    with torch.no_grad():
        # No state is passed on: only the last step has any influence.
        recurrent_weight(model).zero_()
    share = float((input_gradient(model, x) == 0).double().mean())
    assert share > 0.8
    found = numbers(one_step(model, x))
    assert found["grad_first"] == found["grad_middle"] == 0 < found["grad_last"]
    assert found["grad_zero_fraction"] == pytest.approx(share)


def faded(dtype: torch.dtype) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net(nn.RNN(FEATURES, UNITS, batch_first=True, dtype=dtype))
    with torch.no_grad():
        recurrent_weight(model).copy_(torch.eye(UNITS) * 0.25)
    return model, batch(2, 100, FEATURES).to(dtype)


def test_what_fades_below_the_dtype_is_zero_there_and_not_in_a_wider_one() -> None:
    """0.25¹⁰⁰ is 1e-60: float32 has no such number, so it trains nothing either."""
    model, x = faded(torch.float32)
    (expected,) = along_time(model.rnn, list(x), last)
    assert 0 < expected.first < 1e-60
    share = float((input_gradient(model, x) == 0).double().mean())
    assert 0.1 < share < 0.5
    narrow = numbers(one_step(model, x))
    assert narrow["grad_first"] == 0
    assert narrow["grad_zero_fraction"] == pytest.approx(share)
    assert narrow["grad_middle"] == pytest.approx(expected.middle, rel=1e-4)
    model, x = faded(torch.float64)
    wide = numbers(one_step(model, x))
    # The log's smallest number: less than that, and not nothing.
    assert wide["grad_first"] == pytest.approx(1.4e-45, rel=0.01)
    assert wide["grad_zero_fraction"] == 0


def test_what_explodes_is_counted() -> None:
    model, x = net("relu"), torch.zeros(1, 200, FEATURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        recurrent_weight(model).copy_(torch.eye(UNITS) * 3)
        # The reading stays finite; going back, the gradient does not.
        model.read = lambda out, _h, _c: (out[:, -1] * 1e-30).sum()
    broken = float((~torch.isfinite(input_gradient(model, x))).sum())
    found = numbers(one_step(model, x))
    assert 0 < broken == found["grad_nonfinite"]
    assert 0 < found["grad_last"] < 1e-20
    assert 1e10 < found["grad_middle"] < math.inf
    # Nothing finite is left there.
    assert math.isnan(found["grad_first"])
