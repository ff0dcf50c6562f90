"""Models with activations, and what a model gives: its loss and gradients."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradscope.comparison.activation import ACTIVATIONS, Activation
from gradscope.comparison.sites import find_sites
from gradscope.comparison.swapping import swapping

GELU = ACTIVATIONS["gelu"]
Function = Callable[[Tensor], Tensor]


def loss_and_gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Of the parameters that have one, in their order."""
    model.zero_grad()
    loss = forward()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


def forward_of(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: model(inputs).square().sum()


def swapped(model: nn.Module, inputs: Tensor, activation: Activation = GELU) -> list[Tensor]:
    sites = find_sites(model, forward_of(model, inputs))
    with swapping(model, sites, activation) as seen:
        result = loss_and_gradients(model, forward_of(model, inputs))
    assert seen.missed == ()
    return result


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Stack(nn.Module):
    """Two hidden layers with a function between them that is called in a way of its own."""

    def __init__(self, call: Function, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer(x))
        result: Tensor = self.head(x)
        return result


class Quick(nn.Module):
    """GELU as CLIP approximates it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Sine(nn.Module):
    """Nothing that the catalogue has, and it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin_()


class Other(nn.Module):
    """Not entry by entry, a straight line, or nothing twice."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _rectified(layer: nn.Module, x: Tensor) -> Tensor:
    return F.relu(layer(x))


class Parts(nn.Module):
    """Parts of the forward run again in the backward; some without a module of their own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.reentrant, self.on = reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = self.part(self.inside, x)
        x = self.part(self.block, x)
        for layer in self.layers[:2]:
            x = self.part(partial(_rectified, layer), x)
        result: Tensor = self.layers[3](x)
        return result

    def inside(self, x: Tensor) -> Tensor:
        return F.relu(self.layers[2](F.relu(self.layers[1](x))))

    def part(self, function: Function, x: Tensor) -> Tensor:
        if not self.on:
            return function(x)
        result: Tensor = checkpoint(function, x, use_reentrant=self.reentrant)
        return result
