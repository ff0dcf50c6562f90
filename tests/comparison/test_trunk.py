"""Where along a network the gradient is read, against networks whose ways are known."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradscope.comparison.trunk import Gradients, log_norm, points, seeing_outputs


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(4)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        answer: Tensor = self.head(x)
        return answer


def _names(model: nn.Module, x: Tensor) -> list[str]:
    with seeing_outputs(model) as outputs:
        loss = model(x).square().mean()
    return [point.name for point in points(loss, outputs.seen)]


def test_a_plain_stack_is_read_at_every_layer() -> None:
    model = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(6, 6), nn.ReLU())])
    assert _names(model, torch.randn(4, 6)) == ["0", "2", "4", "6", "8"]


def test_a_branch_is_read_where_it_joins_again() -> None:
    names = _names(_Residual(), torch.randn(4, 6))
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]


def test_what_has_no_common_way_is_read_at_every_layer() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([way(x) for way in self.ways], dim=1)

    assert _names(Parallel(), torch.randn(4, 6)) == [f"ways.{i}" for i in range(4)]


def test_the_gradient_is_autograds_of_each_sample() -> None:
    torch.manual_seed(0)
    model = _Residual()
    x = torch.randn(5, 6)
    with seeing_outputs(model) as outputs:
        loss = model(x).square().mean()
    read_at = points(loss, outputs.seen)
    gradients = Gradients(read_at, samples=5)
    loss.backward()
    gradients.close()

    # By hand: the trunk's states as leaves of one graph.
    states = [model.stem(x)]
    for block in model.blocks:
        states.append(states[-1] + block(states[-1]))
    states.append(model.head(states[-1]))
    expected = torch.autograd.grad(states[-1].square().mean(), states)
    logs = [g.double().norm(dim=1).log().mean().item() for g in expected]
    assert gradients.logs == pytest.approx(logs, rel=1e-6)


def test_a_sample_without_gradient_is_left_out_and_none_at_all_is_minus_infinity() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert log_norm(gradient, 2) == pytest.approx(math.log(5))
    assert log_norm(torch.zeros(2, 2), 2) == -math.inf
    # Below float32's squares, above its own smallest.
    assert log_norm(torch.full((1, 1), 1e-30), 1) == pytest.approx(math.log(1e-30))
    assert log_norm(gradient, None) == pytest.approx(math.log(5))


def test_no_hook_is_left() -> None:
    model = _Residual()
    _names(model, torch.randn(4, 6))
    assert not any(module._forward_hooks for module in model.modules())
