"""The loss and the signals: where they are found without being told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.capture.scope import watch
from gradscope.errors import GradscopeWarning
from gradscope.record import Run
from tests.capture.reference import assert_signal
from tests.capture.trainings import mlp_model, sgd, vectors


def test_criterion_shows_loss_output_and_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = sgd(model)
    criterion = nn.MSELoss()
    with watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope:
        kept = []
        for _ in range(2):
            x, target = torch.randn(4, 6), torch.randn(4, 3) + 5
            output = model(x)
            loss = criterion(output, target)
            loss.backward()
            optimizer.step()
            kept.append((x, output, target, float(loss.detach())))
            with torch.no_grad():
                # Evaluation is part of no step.
                criterion(model(x * 100), target * 100)
        run = scope.run()
    for row, (x, output, target, value) in enumerate(kept):
        assert run.scalars["loss"][row] == pytest.approx(value)
        for name, tensor in (("input", x), ("output", output), ("target", target)):
            # Of the first step there is none before.
            assert_signal(run.signals, row, name, tensor, repeated=0.0 if row else np.nan)


def test_criterion_called_with_keywords_and_without_reduction(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    criterion = nn.CrossEntropyLoss(reduction="none")
    x, y = vectors()
    with watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope:
        output = model(x)
        loss = criterion(target=y, input=output)
        loss.mean().backward()
        optimizer.step()
        run = scope.run()
    assert run.scalars["loss"][0] == pytest.approx(float(loss.detach().mean()))
    assert_signal(run.signals, 0, "output", output)
    assert_signal(run.signals, 0, "target", y)


def test_criterion_over_micro_batches(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    criterion = nn.CrossEntropyLoss()
    values, outputs, targets = [], [], []
    with watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope:
        for _ in range(3):
            x, y = vectors()
            outputs.append(model(x))
            targets.append(y)
            loss = criterion(outputs[-1], y)
            loss.backward()
            values.append(float(loss.detach()))
        optimizer.step()
        run = scope.run()
    assert run.scalars["loss"][0] == pytest.approx(np.mean(values))
    assert_signal(run.signals, 0, "output", *outputs)
    assert_signal(run.signals, 0, "target", *targets)


def test_logged_signals(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = sgd(model)
    x, y = vectors()
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        output = model(x)
        F.cross_entropy(output, y).backward()
        scope.log(output=output, target=y)
        optimizer.step()
        signals = scope.run().signals
    assert_signal(signals, 0, "output", output)
    assert_signal(signals, 0, "target", y)


@dataclass
class Result:
    logits: Tensor
    loss: Tensor


class WithLoss(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor) -> object:
        logits = self.layer(x)
        return self.wrap(logits, F.cross_entropy(logits, y))


LOSSES: dict[str, tuple[Callable[..., object], Callable[..., Tensor]]] = {
    "0-d output": (lambda _, loss: loss, lambda out: out),
    "output.loss": (Result, lambda out: out.loss),
    "output['loss']": (lambda a, b: {"loss": b, "logits": a}, lambda out: out["loss"]),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_that_the_model_returns_is_seen(kind: str, tmp_path: Path) -> None:
    wrap, unwrap = LOSSES[kind]
    model = WithLoss(wrap)
    optimizer = sgd(model)
    expected = []
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(4):
            loss = unwrap(model(*vectors()))
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
        run = scope.run()
    assert list(run.scalars["loss"]) == pytest.approx(expected)
    assert run.meta["coverage"]["loss_seen"] is True


def test_parts_of_a_loss_add_up(tmp_path: Path) -> None:
    """transformers' models return the sum over their words, divided by those of the whole step."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(
            self, x: Tensor, y: Tensor, num_items_in_batch: int | None = None
        ) -> dict[str, Tensor]:
            logits = self.layer(x)
            if num_items_in_batch is None:
                return {"loss": F.cross_entropy(logits, y), "logits": logits}
            loss = F.cross_entropy(logits, y, reduction="sum") / num_items_in_batch
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    model = Model()
    optimizer = sgd(model)
    x, y = vectors()
    expected = []
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for parts in (2, 3, 1):
            with torch.no_grad():
                expected.append(float(F.cross_entropy(model.layer(x), y)))
            for rows in torch.arange(len(x)).tensor_split(parts):
                model(x[rows], y[rows], num_items_in_batch=len(x))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        run = scope.run()
    assert run.scalars["loss"] == pytest.approx(expected, rel=1e-6)


def test_what_the_user_logs_outranks_what_was_found(tmp_path: Path) -> None:
    model = WithLoss(Result)
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        result = model(*vectors())
        assert isinstance(result, Result)
        result.loss.backward()
        scope.log(loss=42.0)
        optimizer.step()
        assert list(scope.run().scalars["loss"]) == [42.0]


def train_without_loss(log_dir: Path, steps: int, log: dict[str, Any]) -> Run:
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=log_dir, every=1) as scope:
        for _ in range(steps):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scope.log(**log)
        return scope.run()


def test_no_loss_is_said_once_after_the_third_step(tmp_path: Path) -> None:
    with pytest.warns(GradscopeWarning) as caught:
        run = train_without_loss(tmp_path, 9, {"accuracy": 0.5})
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1
    assert "no loss was seen in the first 3 steps" in said[0]
    assert "scope.log(loss=loss)" in said[0]
    assert np.isnan(run.scalars["loss"]).all()
    assert [problem["part"] for problem in run.meta["problems"]] == ["loss"]


@pytest.mark.parametrize(("steps", "log"), [(3, {}), (9, {"loss": 1.0})])
def test_nothing_is_said_too_early_or_where_a_loss_was_seen(
    steps: int, log: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    # Three steps: the third has not closed before run() asks.
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(steps):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scope.log(**log)
        assert [str(w.message) for w in recwarn] == []
