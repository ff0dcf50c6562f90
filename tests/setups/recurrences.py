"""The recurrences of nn.RNN, nn.LSTM and nn.GRU by hand, in float64: the gradient at each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
# Of the padded output (batch, time, units), h_n and an LSTM's c_n (layers × directions, batch,
# units): the loss.
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def next_state(module: nn.RNNBase, suffix: str, x: Tensor, state: State) -> State:
    """One time step of one layer and direction, as the documentation of torch writes it."""
    w = {
        name: getattr(module, f"{name}_{suffix}").detach().double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        if hasattr(module, f"{name}_{suffix}")
    }
    h = state[0]
    a = w["weight_ih"] @ x + w.get("bias_ih", torch.zeros(()))
    b = w["weight_hh"] @ h + w.get("bias_hh", torch.zeros(()))
    if module.mode == "LSTM":
        i, f, g, o = (a + b).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (w["weight_hr"] @ h if "weight_hr" in w else h), c
    if module.mode == "GRU":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
        z = (a_z + b_z).sigmoid()
        n = (a_n + (a_r + b_r).sigmoid() * b_n).tanh()
        return ((1 - z) * n + z * h,)
    return ((a + b).tanh() if module.mode == "RNN_TANH" else (a + b).relu(),)


def start(module: nn.RNNBase, index: int, at: int, given: Sequence[Tensor] | None) -> State:
    """The state of one sequence before its first time step."""
    if given is not None:
        return tuple(state[index, at].detach().double() for state in given)
    projected = module.proj_size or module.hidden_size
    sizes = [projected, module.hidden_size] if module.mode == "LSTM" else [projected]
    return tuple(torch.zeros(size, dtype=torch.float64) for size in sizes)


def unrolled(
    module: nn.RNNBase, x: Tensor, at: int, given: Sequence[Tensor] | None
) -> tuple[list[list[Tensor]], list[State]]:
    """One sequence through all layers: the last layer's outputs per direction, final states."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    steps = list(x)
    finals: list[State] = []
    tops: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        tops = []
        for direction, ending in enumerate(directions):
            state = start(module, layer * len(directions) + direction, at, given)
            outputs: list[Tensor] = []
            for step in reversed(steps) if direction else steps:
                state = next_state(module, f"l{layer}{ending}", step, state)
                outputs.append(state[0])
            tops.append(outputs[::-1] if direction else outputs)
            finals.append(state)
        steps = [torch.cat(parts) for parts in zip(*tops, strict=True)]
    return tops, finals


@dataclass(frozen=True)
class AlongTime:
    """Norms over the batch of ∂L/∂x at each sequence's first, middle and last step read."""

    first: float
    middle: float
    last: float


def along_time(
    module: nn.RNNBase, xs: Sequence[Tensor], loss: Loss, given: Sequence[Tensor] | None = None
) -> list[AlongTime]:
    """Of the sequences, each (time, features), through either direction's outputs."""
    count = 2 if module.bidirectional else 1
    # The same net for each direction, of which only that direction's outputs are read.
    copies = [[x.detach().double().requires_grad_() for x in xs] for _ in range(count)]
    runs = [[unrolled(module, x, at, given) for at, x in enumerate(copy)] for copy in copies]
    rows = []
    for at, x in enumerate(xs):
        halves = [torch.stack(runs[d][at][0][d]) for d in range(count)]
        empty = torch.zeros(max(map(len, xs)) - len(x), sum(h.shape[1] for h in halves))
        rows.append(torch.cat([torch.cat(halves, 1), empty.double()]))
    states = [
        torch.stack(
            [
                torch.stack([runs[index % count][at][1][index][part] for at in range(len(xs))])
                for index in range(module.num_layers * count)
            ]
        )
        for part in range(2 if module.mode == "LSTM" else 1)
    ]
    value = loss(torch.stack(rows), states[0], states[1] if len(states) > 1 else None)
    found = []
    for direction, copy in enumerate(copies):
        gradients = torch.autograd.grad(value, copy, retain_graph=True)
        read = [g.numpy()[::-1] if direction else g.numpy() for g in gradients]
        norms = [
            float(np.sqrt(sum((g[place(len(g))] ** 2).sum() for g in read)))
            for place in (lambda _: 0, lambda length: length // 2, lambda length: length - 1)
        ]
        found.append(AlongTime(*norms))
    return found


def _pattern(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=tensor.dtype).cos().reshape(tensor.shape)


def last(out: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
    """Only the last output is read."""
    del h, c
    return (out[:, -1] * _pattern(out[:, -1])).exp().sum()


def every(out: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
    """Every output is read."""
    del h, c
    return (out * _pattern(out) + out.square()).sum()


def state(out: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
    """The final states are read, and not the output."""
    del out
    value = (h * _pattern(h)).exp().sum()
    return value if c is None else value + (c * _pattern(c)).square().sum()


def both(out: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
    """Outputs and final states are read."""
    return every(out, h, c) + state(out, h, c)


READS: dict[str, Loss] = {read.__name__: read for read in (last, every, state, both)}
