"""Trainings of models that call their activations and their attention as functions."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)

import gradscope
from tests.setups import gpt
from tests.trainings.programs import Batch, batches, digits, fit, initialize

Activation = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Linear layers with a function between them."""

    def __init__(self, function: Activation, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.function(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


# Faulty.


def dead_functional_relu(*, repaired: bool = False) -> gradscope.Report:
    """Biases at -2 on inputs in [0, 1]: all units are dead from the start."""
    model = Net(F.relu, 64, 64, 64, 10)
    initialize(
        model,
        lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
        bias=0.0 if repaired else -2.0,
    )
    return fit(model, torch.optim.SGD(model.parameters(), 0.1), batches(digits(), 200))


def wide_weights_before_functional_tanh(*, repaired: bool = False) -> gradscope.Report:
    """N(0, 1) before torch.tanh."""
    model = Net(torch.tanh, 64, 64, 64, 64, 10)
    initialize(model, nn.init.xavier_normal_ if repaired else nn.init.normal_)
    return fit(model, torch.optim.SGD(model.parameters(), 0.01), batches(digits(), 200))


def killed_functional_relu(*, repaired: bool = False) -> gradscope.Report:
    """SGD with a learning rate of 3 kills every unit within a few steps."""
    model = Net(lambda x: F.relu(x, inplace=True), 64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05 if repaired else 3.0, momentum=0.9)
    return fit(model, optimizer, batches(digits(), 200))


# Healthy.


def functional_cnn() -> gradscope.Report:
    """As in torch's own tutorial."""

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3)
            self.fc1, self.fc2 = nn.Linear(16 * 4, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv1(x.view(-1, 1, 8, 8))), 2)
            x = F.relu(self.conv2(x), inplace=True).flatten(1)
            out: Tensor = self.fc2(F.dropout(self.fc1(x).relu(), 0.2, self.training))
            return out

    model = Cnn()
    return fit(model, torch.optim.Adam(model.parameters(), 1e-3), batches(digits(), 200))


def functional_gelu_residual() -> gradscope.Report:
    """Pre-norm blocks with gelu inside."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
            return out

    model = nn.Sequential(nn.Linear(64, 32), *(Block() for _ in range(4)), nn.Linear(32, 10))
    return fit(model, torch.optim.AdamW(model.parameters(), 1e-3), batches(digits(), 200))


def functional_gates() -> gradscope.Report:
    """A recurrent cell written by hand: sigmoids that open and close, tanh between them."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates, self.new = nn.Linear(8 + 24, 48), nn.Linear(8 + 24, 24)
            self.head = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 24)
            for row in x.view(-1, 8, 8).unbind(1):
                reset, update = torch.sigmoid(self.gates(torch.cat([row, state], 1))).chunk(2, 1)
                new = torch.tanh(self.new(torch.cat([row, reset * state], 1)))
                state = update * state + (1 - update) * new
            out: Tensor = self.head(state)
            return out

    model = Cell()
    return fit(model, torch.optim.Adam(model.parameters(), 3e-3), batches(digits(), 200))


def functional_tanh() -> gradscope.Report:
    """Xavier before torch.tanh."""
    model = Net(torch.tanh, 64, 48, 48, 48, 10)
    initialize(model, nn.init.xavier_normal_)
    return fit(
        model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batches(digits(), 200)
    )


def functional_mixture() -> gradscope.Report:
    """Experts weighed by a softmax, silu inside."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.head = nn.Linear(64, 3), nn.Linear(32, 10)
            self.experts = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            shares = F.softmax(self.router(x), dim=-1).unsqueeze(-1)
            hidden = torch.stack([F.silu(expert(x)) for expert in self.experts], 1)
            out: Tensor = self.head((shares * hidden).sum(1))
            return out

    model = Mixture()
    return fit(model, torch.optim.Adam(model.parameters(), 1e-3), batches(digits(), 200))


def small_gpt() -> gradscope.Report:
    """Counting, with fused and spelled-out attention."""

    def sentences() -> Iterator[Batch]:
        for _ in range(200):
            starts = torch.randint(0, gpt.VOCABULARY, (16, 1))
            tokens = (starts + torch.arange(gpt.LENGTH + 1)) % gpt.VOCABULARY
            yield tokens[:, :-1], tokens[:, 1:].flatten()

    model = gpt.GPT()
    return fit(
        model,
        torch.optim.AdamW(model.parameters(), 3e-3),
        sentences(),
        lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets),
    )
