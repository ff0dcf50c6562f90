"""Small trainings, each built and run the same way with and without gradscope."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, SparseAdam


class Probe(Protocol):
    """Who looks at the model right before and right after an update."""

    def before_update(self) -> None: ...

    def after_update(self) -> None: ...


class Nobody:
    """Nobody looks: gradscope does."""

    def before_update(self) -> None:
        """Nothing."""

    def after_update(self) -> None:
        """Nothing."""


Stepper = Callable[[int, Probe], Tensor]


@dataclass
class Training:
    """A model, its optimizers, and what one step of its loop does; returns the step's loss."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    take_step: Stepper
    scheduler: object = None
    extra: dict[str, object] = field(default_factory=dict)

    def step(self, number: int, probe: Probe) -> Tensor:
        """One step with data and random numbers that depend on its number alone."""
        torch.manual_seed(1000 + number)
        return self.take_step(number, probe)


Build = Callable[[], Training]


def built(build: Build) -> Training:
    """The training, with initial weights that do not depend on what ran before."""
    torch.manual_seed(0)
    return build()


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = self.relu(self.conv2(x))
        out: Tensor = self.head(x.flatten(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        out: Tensor = self.head(states[:, -1])
        return out


class Reused(nn.Module):
    """One hidden layer, run four times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(4):
            x = torch.tanh(self.hidden(x))
        out: Tensor = self.head(x)
        return out


class Tied(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(self.embedding(tokens))))
        return out


class PartlyUsed(nn.Module):
    """A branch that the forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.body(x)))
        return out


def mlp_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six inputs, five classes."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)
    ).to(dtype)


def _labels(count: int) -> Tensor:
    return torch.randint(5, (count,))


def vectors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch for what takes six features."""
    return torch.randn(12, 6, dtype=dtype), _labels(12)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 6, 6), _labels(4)


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 7, 6), _labels(4)


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(5, (12,)), _labels(12)


Batch = Callable[[], tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[nn.Module], Optimizer]


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def lbfgs(model: nn.Module) -> Optimizer:
    return LBFGS(model.parameters(), lr=0.5, max_iter=4)


def plain(model: nn.Module, batch: Batch, make: MakeOptimizer = sgd) -> Training:
    """Forward, backward, step."""
    optimizer = make(model)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        probe.before_update()
        optimizer.step()
        probe.after_update()
        return loss

    return Training(model, [optimizer], step)


def with_closure(model: nn.Module, batch: Batch, make: MakeOptimizer) -> Training:
    """`optimizer.step(closure)`: what the optimizer is given is what the first call leaves."""
    optimizer = make(model)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = batch()
        losses = []

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss)
            probe.before_update()
            return float(loss.detach())

        optimizer.step(closure)
        probe.after_update()
        return losses[0]

    return Training(model, [optimizer], step)


def accumulated() -> Training:
    """Four micro-batches, one step."""
    model = mlp_model()
    optimizer = momentum(model)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        optimizer.zero_grad()
        losses = []
        for _ in range(4):
            x, y = vectors()
            losses.append(F.cross_entropy(model(x), y) / 4)
            losses[-1].backward()
        probe.before_update()
        optimizer.step()
        probe.after_update()
        return torch.stack(losses).sum()

    return Training(model, [optimizer], step)


def clipped() -> Training:
    """The user clips: the optimizer is given the clipped gradient."""
    model = mlp_model()
    optimizer = sgd(model)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = vectors()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        probe.before_update()
        optimizer.step()
        probe.after_update()
        return loss

    return Training(model, [optimizer], step)


def frozen() -> Training:
    """The first layer is not trainable."""
    model = mlp_model()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return plain(model, vectors)


def two_optimizers() -> Training:
    """Body and head have an optimizer each; one step is a step of both."""
    model = mlp_model()
    body = SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    head = Adam(model[4].parameters(), lr=0.01)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = vectors()
        body.zero_grad()
        head.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        probe.before_update()
        body.step()
        head.step()
        probe.after_update()
        return loss

    return Training(model, [body, head], step)


def rescaled(factor: float, dtype: torch.dtype = torch.float32) -> Training:
    """A loss so large or small that the squares of the gradient leave float32."""
    model = mlp_model(dtype)
    optimizer = SGD(model.parameters(), lr=0.1 / factor)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = vectors(dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * factor
        loss.backward()
        probe.before_update()
        optimizer.step()
        probe.after_update()
        return loss

    return Training(model, [optimizer], step)


def poisoned(values: Sequence[float]) -> Training:
    """Some entries of one gradient are overwritten with these values."""
    model = mlp_model()
    optimizer = sgd(model)

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = vectors()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        gradient = model[2].weight.grad
        assert isinstance(gradient, Tensor)
        gradient.view(-1)[: len(values)] = torch.tensor(values)
        probe.before_update()
        optimizer.step()
        probe.after_update()
        return loss

    return Training(model, [optimizer], step)


def sparse_embedding() -> Training:
    """An embedding with sparse gradients."""
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 5))
    optimizers: list[Optimizer] = [SparseAdam(model[0].parameters()), sgd(model[1])]

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = torch.randint(50, (12,)), _labels(12)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        probe.before_update()
        for optimizer in optimizers:
            optimizer.step()
        probe.after_update()
        return loss

    return Training(model, optimizers, step)


def hand_written() -> Training:
    """Updates without an optimizer; `extra["mark"]`, if set, is called before each."""
    model = mlp_model()
    training = Training(model, [], lambda *_: torch.zeros(()))

    def step(number: int, probe: Probe) -> Tensor:
        del number
        x, y = vectors()
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        probe.before_update()
        mark = training.extra.get("mark")
        if callable(mark):
            mark()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
        probe.after_update()
        return loss

    training.take_step = step
    return training
