"""Nets with a fused recurrent layer, and what a run says of their gradient along time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence
from torch.optim import SGD, Optimizer

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.setups.recurrences import AlongTime, Loss, last

FEATURES, UNITS, BATCH, STEPS = 3, 5, 4, 7
ENDS = ("first", "middle", "last")
MODES: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


class Net(nn.Module):
    """A recurrent layer and a loss that reads some of what it returns."""

    def __init__(self, rnn: nn.RNNBase, read: Loss = last) -> None:
        super().__init__()
        self.rnn = rnn
        self.read = read

    def forward(self, x: Any, *hidden: Any) -> Tensor:
        return self.loss(*self.rnn(x, *hidden))

    def loss(self, out: Any, finals: Any) -> Tensor:
        h, c = finals if isinstance(finals, tuple) else (finals, None)
        if not isinstance(out, Tensor):
            out, _ = pad_packed_sequence(out, batch_first=True)
        elif out.dim() == 2:
            out, h, c = out[None], h[:, None], None if c is None else c[:, None]
        elif not self.rnn.batch_first:
            out = out.transpose(0, 1)
        return self.read(out, h, c)


def net(mode: str = "lstm", read: Loss = last, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(MODES[mode](FEATURES, UNITS, **{"batch_first": True, **options}), read)


def batch(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (BATCH, STEPS, FEATURES)), generator=generator)


def update(model: nn.Module, optimizer: Optimizer, *given: Any) -> None:
    optimizer.zero_grad()
    model(*given).backward()
    optimizer.step()


def one_step(model: nn.Module, *given: Any, **options: Any) -> Run:
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch(model, optimizer, every=1, **options) as scope:
        update(model, optimizer, *given)
        return scope.run()


def numbers(run: Run, name: str = "rnn", row: int = 0) -> dict[str, float]:
    column = run.modules.names.index(name)
    return {
        quantity.removeprefix("time_"): float(run.modules[quantity][row, column])
        for quantity in run.modules.quantities
        if quantity.startswith("time_")
    }


def is_unmeasured(run: Run, name: str = "rnn", row: int = 0) -> bool:
    return all(math.isnan(number) for number in numbers(run, name, row).values())


def assert_along_time(
    run: Run, expected: AlongTime, name: str = "rnn", row: int = 0, rtol: float = 1e-4
) -> None:
    found = numbers(run, name, row)
    for end in ENDS:
        assert found[f"grad_{end}"] == pytest.approx(getattr(expected, end), rel=rtol), end
    assert found["grad_nonfinite"] == 0


def merged(parts: Sequence[AlongTime]) -> AlongTime:
    """Micro-batches count as one concatenated sample."""
    return AlongTime(*(math.hypot(*(getattr(part, end) for part in parts)) for end in ENDS))


def said(run: Run) -> str:
    return " | ".join(
        p["message"] for p in run.meta["problems"] if p["part"] == "gradients along time"
    )


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf), leaf)
    return gradient


class Classifier(nn.Module):
    """Two layers with dropout between them, behind a layer of its own."""

    def __init__(self, dropout: float = 0.5, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 6)
        options = {"num_layers": 2, "dropout": dropout, "batch_first": True, **options}
        self.rnn = nn.LSTM(6, UNITS, **options)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(UNITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(self.embed(x))[0]
        loss: Tensor = self.head(self.drop(hidden[:, -1])).square().mean()
        return loss


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**options)


def recurrent_weight(model: Net) -> Tensor:
    return dict(model.rnn.named_parameters())["weight_hh_l0"]
