"""Taking the graph stops nothing, and costs nothing once it is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.capture.scope import watch
from gradscope.errors import GradscopeWarning
from gradscope.log.reader import load
from tests.capture.trainings import mlp_model, sgd, vectors


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("gradscope.capture.graph.walked", "autograd graph"),
        ("gradscope.capture.handover.Handover.graph", "autograd graph"),
        ("gradscope.capture.signals.spread", "signals"),
    ],
)
def test_failure_stops_that_part_alone(
    broken: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        message = "out of luck"
        raise ValueError(message)

    monkeypatch.setattr(broken, fail)
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:

        def step() -> Tensor:
            loss = F.mse_loss(model(torch.ones(5, 3)), torch.zeros(5, 2))
            loss.backward()
            scope.log(loss=loss)
            optimizer.step()
            return loss.detach()

        with pytest.warns(GradscopeWarning, match=f"{part} disabled: ValueError: out of luck"):
            loss = step()
        run = scope.run()
    assert [problem["part"] for problem in run.meta["problems"]] == [part]
    assert ("graph" in run.meta) == (part == "signals")
    assert run.signals["max"][0, run.signals.names.index("input")] == 1
    assert run.scalars["loss"][0] == pytest.approx(float(loss))


class Dispatched(TorchDispatchMode):
    """Lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_unrecorded_step_runs_what_it_runs_without_gradscope(tmp_path: Path) -> None:
    def trained(model: nn.Module, log_dir: Path | None) -> tuple[list[str], list[Tensor]]:
        """The operations of the third step: the second closes the first, which is recorded."""
        optimizer = sgd(model)
        scope = None if log_dir is None else watch(model, optimizer, log_dir=log_dir, every=9)
        for step in range(3):
            with Dispatched() as dispatched:
                torch.manual_seed(step)
                x, y = vectors()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if scope is not None and step == 0:
                    scope.log(loss=loss, target=y)
                optimizer.step()
        if scope is not None:
            scope.close()
        return dispatched.ops, [p.detach().clone() for p in model.parameters()]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(mlp_model(), nn.Dropout(0.5), nn.BatchNorm1d(5))

    bare, weights = trained(model(), None)
    watched, same = trained(model(), tmp_path)
    assert "graph" in load(tmp_path).meta
    assert watched == bare
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
