"""What signals look like: their range, how they spread over a batch, whether they repeat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture import spread
from gradscope.capture.scope import Scope, watch
from gradscope.record import Table
from tests.capture.reference import assert_signal
from tests.capture.trainings import mlp_model, sgd, vectors

NAN = float("nan")


class Scale(nn.Module):
    """Finds the tensor in what it is given, and returns it times a weight."""

    def __init__(self, find: Callable[[Any], Tensor] = lambda given: given) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.find = find

    def forward(self, given: Any) -> Tensor:
        return self.find(given).float() * self.weight


def spoilt() -> Tensor:
    x = torch.randn(6, 4)
    x[0, 0], x[2, 3] = torch.nan, torch.inf
    # Of this feature one entry is left.
    x[1:, 1] = torch.nan
    return x


def mask(x: Tensor) -> dict[str, Tensor]:
    return {"mask": x > 0, "x": x}


# What the model is given, and the tensor in it that counts.
INPUTS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "vectors": (lambda: torch.randn(8, 5) * torch.arange(1.0, 6.0), lambda x: x, lambda x: x),
    "numbers": (lambda: torch.randn(9), lambda x: x, lambda x: x),
    "images": (lambda: torch.randn(4, 3, 5, 5) + 100, lambda x: x, lambda x: x),
    "channels last": (
        lambda: torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
        lambda x: x,
        lambda x: x,
    ),
    "half precision": (lambda: torch.randn(8, 5).bfloat16(), lambda x: x, lambda x: x),
    "tokens": (lambda: torch.randint(7, (4, 6)), lambda x: x, lambda x: x),
    "one sample": (lambda: torch.randn(1, 5), lambda x: x, lambda x: x),
    "nothing": (lambda: torch.randn(0, 5), lambda x: x, lambda x: x),
    "NaN": (spoilt, lambda x: x, lambda x: x),
    "NaN alone": (lambda: torch.full((4, 2), torch.nan), lambda x: x, lambda x: x),
    "the same samples": (lambda: torch.rand(5).repeat(6, 1), lambda x: x, lambda x: x),
    "mapping": (lambda: torch.randn(8, 5), mask, lambda given: given["x"]),
    "tuple": (lambda: torch.randn(8, 5), lambda x: (2, x, x * 9), lambda given: given[1]),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_input_and_output(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, pack, find = INPUTS[kind]
    model = Scale(find)
    x, other = make(), make()
    with watch(model, sgd(model), log_dir=tmp_path, every=1) as scope:
        outputs = []
        for given in (x, x.clone(), other):
            outputs.append(model(pack(given)))
            outputs[-1].nansum().backward()
            # The weight stays as it is.
            model.weight.grad = None
            scope._observer.hand_step()
        signals = scope.run().signals
    repeats = bool(x.numel())
    changed = float(kind == "NaN alone")
    for row, (given, repeated) in enumerate([(x, NAN), (x, 1.0), (other, changed)]):
        known = repeated if repeats else NAN
        assert_signal(signals, row, "input", given, repeated=known)
        assert_signal(signals, row, "output", outputs[row], repeated=known)
    if kind == "the same samples":
        # Not a rounding error.
        assert signals["sample_std"][0, signals.names.index("input")] == 0


def train(scope: Scope, model: nn.Module, optimizer: SGD, batches: list[Tensor]) -> Table:
    for x in batches:
        model(x).mean().backward()
        optimizer.step()
    return scope.run().signals


def test_micro_batches_are_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    parts = [torch.randn(4, 6), torch.randn(1, 6) * 9, torch.randn(7, 6) + 3]
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for last in (torch.zeros(2, 6), torch.ones(2, 6)):
            for x in (*parts, last):
                model(x).mean().backward()
            optimizer.step()
        signals = scope.run().signals
    assert_signal(signals, 0, "input", *parts, torch.zeros(2, 6))
    # The first of each step are compared.
    assert_signal(signals, 1, "input", *parts, torch.ones(2, 6), repeated=1.0)


def test_what_is_repeated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    almost, shorter, signed = x.clone(), x[:3], torch.zeros(4, 6)
    almost[3, 5] = torch.nextafter(x[3, 5], torch.tensor(9.0))
    batches = [x, x, almost, almost, shorter, x, signed, -signed, x.double().float() * 0 - 0.0]
    model = nn.Linear(6, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path / "all", every=1) as scope:
        signals = train(scope, model, optimizer, batches)
    expected = [NAN, 1, 0, 1, 0, 0, 0, 0]
    found = signals["repeated"][:, signals.names.index("input")]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    with watch(model, optimizer, log_dir=tmp_path / "some", every=2) as scope:
        signals = train(scope, model, optimizer, [x] * 6)
    # Of no recorded step that before was recorded.
    assert len(signals.steps) == 3
    assert np.isnan(signals["repeated"]).all()


def test_spread_is_looked_at_ever_more_rarely(tmp_path: Path) -> None:
    model = nn.Linear(6, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        signals = train(scope, model, optimizer, [torch.randn(4, 6) for _ in range(32)])
    for quantity in ("sample_std", "feature_std_min", "feature_std_max", "distinct"):
        known = ~np.isnan(signals[quantity]).all(axis=1)
        assert list(np.flatnonzero(known)) == [*range(10), 19, 29]
    # These come with what is always measured.
    for quantity in ("min", "max", "std"):
        assert not np.isnan(signals[quantity]).any()
    assert not np.isnan(signals["repeated"][1:, signals.names.index("input")]).any()


@pytest.mark.parametrize("shape", [(16, 3, 224, 224), (300, 2000), (40, 30_000), (200_000,)])
def test_large_signals_are_looked_at_on_a_sample(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 50
    sample = spread.fingerprint(x)
    assert 2_000 < len(sample) <= 4_096
    found = spread.spread(x, sample)
    assert float(found[0]) == pytest.approx(
        float(x.double().std(0).square().mean().sqrt()), rel=0.04
    )
    assert float(found[3]) == len(sample.unique())
    if len(shape) > 1:
        # Of 33 samples of each feature, among thousands of features.
        assert 0.3 < float(found[1]) / 3 <= float(found[0]) / 3 <= float(found[2]) / 3 < 1.7
        assert float(spread.spread(x * 0 + x[:1], sample)[0]) == 0


def test_every_feature_of_a_few_thousand_is_seen() -> None:
    x = torch.randn(64, 4_096)
    x[:, 1_234] = 7.0
    x[:, 777] *= 1_000
    found = spread.spread(x, spread.fingerprint(x))
    assert float(found[1]) == 0
    assert float(found[2]) > 500


@pytest.mark.parametrize("logs", [False, True])
def test_one_source_of_an_output_counts(logs: bool, tmp_path: Path) -> None:
    """The user's word before the model's own output, and that before the criterion's."""
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = sgd(model)
    criterion = nn.CrossEntropyLoss()
    with watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope:
        for _ in range(2):
            x, y = vectors()
            output = model(x)
            logged = output.detach() * 3
            logged[0, 0] = torch.nan
            criterion(output * 2, y).backward()
            if logs:
                scope.log(output=logged, target=y[:6])
            optimizer.step()
        signals = scope.run().signals
    assert_signal(signals, 1, "output", logged if logs else output, repeated=0.0)
    assert_signal(signals, 1, "target", y[:6] if logs else y, repeated=0.0)


def test_level_of_parameters_looks_no_closer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level="parameters") as scope:
        for _ in range(2):
            x, y = vectors()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        signals = scope.run().signals
    assert signals.names == ("input",)
    assert signals["max"][1, 0] == pytest.approx(float(x.max()))
    for quantity in ("sample_std", "feature_std_min", "distinct", "repeated"):
        assert np.isnan(signals[quantity]).all()
