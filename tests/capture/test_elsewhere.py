"""Watched modules run in unusual ways: what can't be recorded neither fails nor pollutes."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import Scope, watch
from gradscope.record import Run
from tests.capture.reference import recomputed
from tests.capture.trainings import mlp_model, plain, sgd, vectors

STEPS = 3


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp_model()


@pytest.fixture
def scope(model: nn.Module, tmp_path: Path) -> Iterator[Scope]:
    with watch(model, log_dir=tmp_path, every=1) as scope:
        yield scope


def train(model: nn.Module, scope: Scope, between: Callable[[], object]) -> Run:
    """Between forward and backward, and after the step, something happens."""
    optimizer = sgd(model)
    for number in range(STEPS):
        torch.manual_seed(1000 + number)
        x, y = vectors()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        between()
        loss.backward()
        optimizer.step()
        scope.log(loss=loss)
        between()
    return scope.run()


def assert_unpolluted(run: Run) -> None:
    said = {problem["message"] for problem in run.meta["problems"]}
    assert said <= {"what runs inside torch.func transforms is not recorded"}
    assert list(run.recorded_steps) == list(range(STEPS))
    expected = recomputed(lambda: plain(mlp_model(), vectors), STEPS)
    for row, step in enumerate(expected):
        for name, numbers in step.items():
            found = run.parameters["grad_norm"][row, run.parameters.names.index(name)]
            assert found == pytest.approx(numbers["grad_norm"], rel=1e-4)
    # The batches are standard normal; what happens between them is a hundred times that.
    assert run.signals["rms"][:, run.signals.names.index("input")].max() < 2
    assert run.modules["output_rms"].max() < 10


LARGE = 100.0


def as_replica(model: nn.Sequential) -> None:
    """As `nn.DataParallel` runs it."""
    layer: Any = model[0]
    replica = layer._replicate_for_data_parallel()
    # What the replication of a whole model adds.
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    replica(torch.full((2, 6), LARGE))


def as_bare_replica(model: nn.Sequential) -> None:
    """Not even its representation can be made."""
    layer: Any = model[1]
    replica = layer._replicate_for_data_parallel()
    del replica._modules
    replica(torch.full((2, 6), LARGE))


def as_shallow_copy(model: nn.Sequential) -> None:
    copy.copy(model[0])(torch.full((2, 6), LARGE))


def under_func_grad(model: nn.Sequential) -> None:
    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, (x,)).square().mean()
        return out

    weights = {name: p.detach() for name, p in model.named_parameters()}
    grad(loss)(weights, torch.full((2, 6), LARGE))


def under_vmap(model: nn.Sequential) -> None:
    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, (x,)).square().mean()
        return out

    weights = {name: p.detach() for name, p in model.named_parameters()}
    vmap(grad(loss), (None, 0))(weights, torch.full((2, 6), LARGE))


WAYS = [as_replica, as_bare_replica, as_shallow_copy, under_func_grad, under_vmap]


@pytest.mark.parametrize("way", WAYS)
def test_recording_goes_on(
    way: Callable[[nn.Sequential], None], model: nn.Sequential, scope: Scope
) -> None:
    assert_unpolluted(train(model, scope, lambda: way(model)))


def test_gradient_that_in_place_work_on_a_view_hides_is_said(tmp_path: Path) -> None:
    class Reshape(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 4)

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reshape, self.last = nn.Linear(4, 8), Reshape(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.reshape(self.first(x)).relu_())
            return out

    model = Hiding()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        run = scope.run()
    at = run.modules.names.index("reshape")
    assert np.isnan(run.modules["output_grad_norm"][0, at])
    coverage = run.meta["coverage"]["modules"]
    assert coverage["output_gradients_unseen"] == ["reshape"]
    assert coverage["output_gradients_seen"] == coverage["output_gradients_expected"] - 1


def test_module_that_never_runs_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.spare = nn.Linear(2, 2)
    model.forward = model[0].__call__  # type: ignore[method-assign]
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        run = scope.run()
    assert run.meta["coverage"]["modules"]["never_ran"] == ["spare"]
    assert "spare" not in run.modules.names


class Rnn(nn.Module):
    """A cell called once per time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


def test_of_uses_beyond_sixteen_the_middle_and_the_last_are_recorded_and_it_is_said(
    tmp_path: Path,
) -> None:
    model = Rnn()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(2):
            model(torch.randn(2, 20, 3)).sum().backward()
            optimizer.step()
        run = scope.run()
    uses = {f"cell#{use}" for use in (*range(1, 16), "middle", "last")}
    assert set(run.modules.names) == {"(root)", "cell", *uses}
    said = [problem["message"] for problem in run.meta["problems"]]
    assert len(said) == 1
    assert "cell runs more than 16 times" in said[0]


@pytest.mark.parametrize(
    ("options", "parameters", "modules"),
    [
        ({"include": "0*"}, {"0.weight", "0.bias"}, {"0"}),
        ({"include": ["2*", "3"]}, {"2.weight", "2.bias"}, {"2", "3"}),
        ({"exclude": ["*.bias", "(root)", "[13]"]}, {"0.weight", "2.weight", "4.weight"}, {*"024"}),
        ({"include": "*.weight", "exclude": "4*"}, {"0.weight", "2.weight"}, set()),
    ],
)
def test_include_and_exclude(
    options: dict[str, Any], parameters: set[str], modules: set[str], tmp_path: Path
) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, **options) as scope:
        for _ in range(2):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert set(run.parameters.names) == parameters
    assert set(run.modules.names) == modules
    assert run.meta["problems"] == []


def test_entities_that_come_late(tmp_path: Path) -> None:
    """A lazy layer before its first forward, and a head that is added in mid-training."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 3))
    with watch(model, log_dir=tmp_path, every=1) as scope:
        model(torch.ones(1, 6))
        optimizer = SGD(model.parameters(), lr=0.1)
        for number in range(4):
            if number == 2:
                model.append(nn.Linear(3, 2))
                optimizer.add_param_group({"params": model[3].parameters()})
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert list(run.parameters.names[-2:]) == ["3.weight", "3.bias"]
    known = ~np.isnan(run.parameters["grad_norm"])
    assert known[:, :4].all()
    assert known[:, 4:].tolist() == [[False, False], [False, False], [True, True], [True, True]]
    at = run.modules.names.index("3")
    assert np.isnan(run.modules["output_rms"][:, at]).tolist() == [True, True, False, False]


def test_empty_batch(model: nn.Module, scope: Scope) -> None:
    optimizer = sgd(model)
    model(torch.zeros(0, 6)).sum().backward()
    optimizer.step()
    scope.log(loss=0.0)
    run = scope.run()
    assert np.isnan(run.modules["output_rms"]).all()
    assert (run.parameters["grad_norm"] == 0).all()
    assert run.meta["problems"] == []


def test_evaluation_of_a_watched_transformer_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Torch takes another path for inference where modules have hooks."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(3, 5, 8)

    def evaluate() -> Tensor:
        model.eval()
        with torch.no_grad():
            out: Tensor = model(x)
        model.train()
        return out

    expected = evaluate()
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1):
        for _ in range(2):
            model(x).sum().backward()
            assert torch.equal(evaluate(), expected)
            optimizer.step()
            assert torch.equal(evaluate(), expected)


class OnlineAndTarget(nn.Module):
    """Returns its loss; one part runs without gradients, as in self-distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.online = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            aim = self.target(x)
        out: Tensor = (self.online(x) - aim).square().mean()
        return out


@pytest.mark.parametrize("part", ["(root)", "target"])
def test_what_ran_is_not_said_to_have_never_run(part: str, tmp_path: Path) -> None:
    model = OnlineAndTarget()
    optimizer = SGD(model.online.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.ones(2, 3)).backward()
        optimizer.step()
        run = scope.run()
    assert part not in run.meta["coverage"]["modules"]["never_ran"]
    assert run.modules["output_rms"][0, run.modules.names.index("online")] > 0
