"""Models with their forward spelled out by hand, every value of it kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.capture import trainings
from tests.capture.trainings import Cnn, Recurrent, mlp_model

# name → its outputs in the order of execution, and the gradient of each.
Seen = dict[str, list[tuple[Tensor, Tensor | None]]]


class Tape:
    """Every value kept, for `torch.autograd.grad` to differentiate by."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self._values[name] = value
        # A value of its own: what is done to it in place does not reach the one kept.
        return value * 1.0

    def seen(self, loss: Tensor) -> Seen:
        values = list(self._values.values())
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
        pairs = zip(self._values, values, gradients, strict=True)
        return {name: [(value.detach(), gradient)] for name, value, gradient in pairs}


@dataclass
class Subject:
    """A model, a batch, and what its forward does, spelled out with a tape."""

    model: nn.Module
    x: Tensor
    y: Tensor
    by_hand: Callable[[Tape, Tensor], Tensor]


def mlp_subject() -> Subject:
    model = mlp_model()

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        for name, module in model.named_children():
            x = tape(name, module(x))
        return tape("(root)", x)

    return Subject(model, *trainings.vectors(), by_hand)


def cnn_subject() -> Subject:
    model = Cnn()

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        x = tape("norm", model.norm(tape("conv1", model.conv1(x))))
        x = tape("relu", torch.relu(x))
        x = tape("conv2", model.conv2(x))
        x = tape("relu#1", torch.relu(x))
        return tape("(root)", tape("head", model.head(x.flatten(1))))

    return Subject(model, *trainings.images(), by_hand)


def lstm_subject() -> Subject:
    model = Recurrent()

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        states = tape("lstm", model.lstm(x)[0])
        return tape("(root)", tape("head", model.head(states[:, -1])))

    return Subject(model, *trainings.sequences(), by_hand)


class ReusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.act = nn.Tanh()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.act(self.layer(x))
        out: Tensor = self.head(x)
        return out


def reused_subject() -> Subject:
    model = ReusedLayer()

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        for use in ("", "#1", "#2", "#3"):
            x = tape(f"act{use}", torch.tanh(tape(f"layer{use}", model.layer(x))))
        return tape("(root)", tape("head", model.head(x)))

    return Subject(model, *trainings.vectors(), by_hand)


@dataclass
class Outputs:
    """A structured output as model libraries have them."""

    loss: None
    note: str
    hidden: Tensor
    count: Tensor


class Structured(nn.Module):
    """A part that returns its result inside a structure; integers and 0-d tensors come first."""

    def __init__(
        self, wrap: Callable[[Tensor], object], unwrap: Callable[[object], Tensor]
    ) -> None:
        super().__init__()
        self.part = _Wrapping(wrap)
        self.head = nn.Linear(8, 5)
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.unwrap(self.part(x)))
        return out


class _Wrapping(nn.Linear):
    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__(6, 8)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:  # type: ignore[override]
        return self.wrap(super().forward(x))


STRUCTURES: dict[str, tuple[Callable[[Tensor], object], Callable[..., Tensor]]] = {
    "tuple": (lambda t: (torch.arange(3), t.sum(), t), lambda v: v[2]),
    "list": (lambda t: [t, t + 1], lambda v: v[0]),
    "dict": (lambda t: {"index": torch.arange(3), "hidden": t}, lambda v: v["hidden"]),
    "nested": (lambda t: {"a": (None, [t])}, lambda v: v["a"][1][0]),
    "dataclass": (lambda t: Outputs(None, "note", t, torch.arange(2)), lambda v: v.hidden),
}


def structured_subject(kind: str) -> Subject:
    wrap, unwrap = STRUCTURES[kind]
    model = Structured(wrap, unwrap)

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        part = tape("part", F.linear(x, model.part.weight, model.part.bias))
        return tape("(root)", tape("head", model.head(part)))

    return Subject(model, *trainings.vectors(), by_hand)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x)
        out: Tensor = self.head(mixed.mean(1))
        return out


def attention_subject() -> Subject:
    model = Attending()

    def by_hand(tape: Tape, x: Tensor) -> Tensor:
        layer = model.attention
        parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts)
        weights = tape("attention/softmax#0", torch.softmax(q @ k.mT / 3**0.5, -1))
        mixed = tape("attention", layer.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        return tape("(root)", tape("head", model.head(mixed.mean(1))))

    return Subject(model, *trainings.sequences(), by_hand)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mlp": mlp_subject,
    "cnn, relu in place": cnn_subject,
    "lstm": lstm_subject,
    "module used four times": reused_subject,
    "attention": attention_subject,
    **{f"{kind} output": lambda kind=kind: structured_subject(kind) for kind in STRUCTURES},  # type: ignore[misc]
}
