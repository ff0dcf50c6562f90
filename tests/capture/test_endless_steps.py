"""A step that goes on and on, as evaluation with gradients enabled does, stays small."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope.capture import pulse, recorder
from gradscope.capture.scope import Scope, watch
from gradscope.record import Run
from tests.capture.reference import described, prefixed, wide
from tests.capture.trainings import mlp_model, sgd, vectors

FORWARDS = 60
# Of a forward: six outputs, how alike each is for two samples, and two rows each of the input and
# the output; of a backward: six gradients.
ROWS, GRADIENTS = 16, 6


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is many is few here; of the limits themselves the tests know."""
    monkeypatch.setattr(recorder, "_MANY_ROWS", 50)
    monkeypatch.setattr(pulse, "_MANY_VALUES", 8)


def rows_of(scope: Scope) -> int:
    step = scope._observer._open
    assert step is not None
    assert step.rows is not None
    return len(step.rows.entries)


def values_of(scope: Scope) -> int:
    known = scope._observer._pulses.known()
    return max(len(values) for pulse in known for values in pulse.values.values())


def evaluate(scope: Scope, model: nn.Module, forwards: int) -> list[int]:
    counts = []
    for number in range(forwards):
        torch.manual_seed(number)
        x, y = vectors()
        scope.log(loss=F.cross_entropy(model(x), y))
        counts.append(rows_of(scope))
    return counts


def test_rows_stop_growing(few: None, tmp_path: Path) -> None:
    del few
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        counts = evaluate(scope, model, FORWARDS)
        assert values_of(scope) <= 8
    # As many as count as many, and those of one more forward; without adding up: 420.
    assert max(counts) <= 50 + ROWS
    assert max(counts[FORWARDS // 2 :]) == max(counts)
    # It is said what came of it.
    problems = scope.run().meta["coverage"]
    assert problems["unfinished_step"]
    assert problems["forwards"] == FORWARDS


def test_the_limit_as_it_is(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        counts = evaluate(scope, model, 700)
        assert values_of(scope) <= 256
    assert max(counts) <= 4_096 + ROWS
    # It was reached twice.
    assert sum(later < earlier for earlier, later in pairwise(counts)) == 2


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("poisoned", [False, True])
def test_every_number_is_that_of_all_forwards(poisoned: bool, tmp_path: Path) -> None:
    """A step of many micro-batches, against one computation over all of them in float64."""
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = sgd(model)
    tanh, scores = [], []
    gradients: list[torch.Tensor] = []
    losses = []
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(FORWARDS):
            torch.manual_seed(number)
            x, y = vectors()
            if poisoned and number == 20:
                x[0, 0] = torch.inf
            output = model(x)
            with torch.no_grad():
                tanh.append(model[:4](x))
            scores.append(output.detach().clone())
            output.register_hook(lambda gradient: gradients.append(gradient.clone()))
            loss = F.cross_entropy(output, y)
            loss.backward()
            losses.append(float(loss.detach()))
            scope.log(loss=loss, half=number / 2)
            assert rows_of(scope) <= 50 + ROWS + GRADIENTS
        optimizer.step()
        run = scope.run()
    check = checker(run)
    check("4", prefixed("output_", described(scores)))
    check("4", prefixed("output_grad_", described(gradients)))
    check("3", prefixed("output_", described(tanh)))
    beyond = np.abs(np.concatenate([wide(values) for values in tanh])) >= 0.97
    check("3", {"output_saturated_fraction": float(beyond.mean())})
    np.testing.assert_allclose(run.scalars["loss"], [np.mean(losses)], rtol=1e-12)
    np.testing.assert_allclose(run.scalars["half"], [(FORWARDS - 1) / 4], rtol=1e-12)


def checker(run: Run) -> Callable[[str, dict[str, float]], None]:
    def check(name: str, expected: dict[str, float]) -> None:
        column = run.modules.names.index(name)
        for quantity in set(expected) & set(run.modules.quantities):
            found = run.modules[quantity][:, column]
            slack = 1e-7 * expected.get(f"{quantity.rpartition('_')[0]}_rms", 0.0)
            np.testing.assert_allclose(found, expected[quantity], rtol=1e-5, atol=slack)

    return check


@pytest.mark.usefixtures("few")
def test_steps_after_it_are_their_own(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(3):
            evaluate(scope, model, FORWARDS if number == 1 else 1)
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        run = scope.run()
    norms = run.modules["output_rms"][:, run.modules.names.index("4")]
    assert list(run.recorded_steps) == [0, 1, 2]
    assert np.isfinite(norms).all()
    assert np.isfinite(run.parameters["grad_norm"]).all()
