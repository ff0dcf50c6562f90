"""Whole trainings on a device without float64: the same numbers as everywhere."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam

from gradscope.capture.scope import watch
from tests.capture import trainings
from tests.capture.reference import assert_equal, recomputed, watched, wide
from tests.capture.test_histograms import HistogramReference
from tests.capture.trainings import (
    Build,
    Cnn,
    Nobody,
    PartlyUsed,
    Recurrent,
    Reused,
    adamw,
    built,
    lbfgs,
    mlp_model,
    momentum,
    plain,
    vectors,
    with_closure,
)
from tests.setups.received import Arrived, assert_describes
from tests.setups.support import support
from tests.setups.without_float64 import no_float64

STEPS = 3

CASES: dict[str, Build] = {
    "mlp": lambda: plain(mlp_model(), vectors),
    "cnn": lambda: plain(Cnn(), trainings.images),
    "lstm": lambda: plain(Recurrent(), trainings.sequences),
    "reused module": lambda: plain(Reused(), vectors),
    "momentum": lambda: plain(mlp_model(), vectors, momentum),
    "adamw": lambda: plain(mlp_model(), vectors, adamw),
    "lbfgs": lambda: with_closure(mlp_model(), vectors, lbfgs),
    "accumulation": trainings.accumulated,
    "frozen": trainings.frozen,
    "unused": lambda: plain(PartlyUsed(), vectors),
    "two optimizers": trainings.two_optimizers,
    "sparse embedding": trainings.sparse_embedding,
    "hand-written": trainings.hand_written,
    "bfloat16": lambda: plain(mlp_model(torch.bfloat16), partial(vectors, torch.bfloat16)),
    "float16": lambda: plain(mlp_model(torch.float16), partial(vectors, torch.float16)),
    "huge gradients": partial(trainings.rescaled, 1e20),
    "tiny gradients": partial(trainings.rescaled, 1e-25),
}


@support(
    "Precision",
    "devices without float64",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("name", CASES)
def test_every_quantity_equals_the_float64_reference(name: str, tmp_path: Path) -> None:
    with no_float64():
        run = watched(CASES[name], STEPS, tmp_path)
    assert run.meta["problems"] == []
    assert_equal(run.parameters, recomputed(CASES[name], STEPS), rtol=1e-5)


@pytest.mark.parametrize("values", [(math.nan,), (math.inf, -math.inf), (math.nan, 0.0)], ids=str)
def test_what_is_not_finite_is_counted_and_left_out(
    values: tuple[float, ...], tmp_path: Path
) -> None:
    # From the second step on the weights are not finite either.
    build = partial(trainings.poisoned, values)
    with no_float64():
        run = watched(build, 2, tmp_path)
    assert run.meta["problems"] == []
    finite = [q for q in run.parameters.quantities if q.startswith(("grad_", "weight_", "update_"))]
    (expected,) = recomputed(build, 1)
    table = run.parameters
    for name, numbers in expected.items():
        for quantity in finite:
            found = table[quantity][0, table.names.index(name)]
            wanted = pytest.approx(numbers.get(quantity, math.nan), rel=1e-5, abs=1e-7, nan_ok=True)
            assert found == wanted, (name, quantity)
    assert table["grad_nonfinite"][0].sum() == sum(not math.isfinite(value) for value in values)


@pytest.mark.parametrize("name", ["mlp", "adamw", "bfloat16", "float16", "huge gradients"])
def test_outputs_and_their_gradients_are_those_of_an_unwatched_twin(
    name: str, tmp_path: Path
) -> None:
    twin = built(CASES[name])
    arrived, counts = Arrived(twin.model), HistogramReference(twin.model)
    for number in range(STEPS):
        twin.step(number, counts)
    training = built(CASES[name])
    with (
        no_float64(),
        watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope,
    ):
        for number in range(STEPS):
            scope.log(loss=training.step(number, Nobody()))
        run = scope.run()
    assert run.meta["problems"] == []
    for module, values in arrived.outputs.items():
        assert_describes(run.modules, "output_", STEPS - 1, module, values)
        gradient = arrived.gradients[module]
        assert_describes(run.modules, "output_grad_", STEPS - 1, module, gradient)
    for parameter, counted in counts.steps[-1].items():
        np.testing.assert_array_equal(run.histograms[parameter][STEPS - 1], counted)
    # Training is what it was, bit for bit.
    for left, right in zip(twin.model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_large_parameters_and_idle_units(tmp_path: Path) -> None:
    def build() -> tuple[nn.Sequential, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4), nn.Sigmoid())
        with torch.no_grad():
            # Thirty units never fire; a quarter of the outputs is at its end.
            model.get_parameter("0.bias")[:30] = -1e6
            model.get_parameter("2.bias")[0] = 1e6
        return model, torch.randn(1024, 300)

    model, x = build()
    optimizer = SGD(model.parameters(), 0.1)
    with no_float64(), watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(4):
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss)
        run = scope.run()
    assert run.meta["problems"] == []
    assert run.modules["dead_unit_fraction"][-1, run.modules.names.index("1")] >= 0.1
    at = run.modules.names.index("3")
    assert run.modules["output_saturated_fraction"][0, at] >= 0.25

    twin, x = build()
    twin(x).square().sum().backward()
    weight = twin.get_parameter("0.weight")
    before, gradient = wide(weight), weight.grad
    assert gradient is not None
    SGD(twin.parameters(), 0.1).step()
    change = wide(weight) - before
    table, at = run.parameters, run.parameters.names.index("0.weight")
    norms = {"weight_norm": before, "grad_norm": wide(gradient), "update_norm": change}
    for quantity, entries in norms.items():
        # Only the update of so large a parameter is measured on a sample.
        rtol = 0.05 if quantity == "update_norm" else 1e-5
        assert table[quantity][0, at] == pytest.approx(np.linalg.norm(entries), rel=rtol)
    assert table["update_gradient_cosine"][0, at] == pytest.approx(-1, abs=1e-5)


# Not a power of two: dividing by it rounds.
SCALE = 1000.0


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_skipped_steps_clipping_and_what_is_logged(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = Adam(model.parameters(), 0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=10_000)
    losses, gradients = [], []
    with (
        no_float64(),
        watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope,
    ):
        for number in range(3):
            torch.manual_seed(number)
            x, y = vectors()
            optimizer.zero_grad()
            output = model(x)
            output.retain_grad()
            loss = F.cross_entropy(output, y)
            scaler.scale(loss * (math.inf if number == 1 else 1.0)).backward()
            weight = model.get_parameter("0.weight").grad
            assert output.grad is not None
            assert weight is not None
            gradients.append((output.grad, weight.clone()))
            scaler.step(optimizer)
            scaler.update()
            scope.log(loss=loss, accuracy=torch.tensor(0.25), epoch=number)
            losses.append(loss.detach())
        run = scope.run()
    assert run.meta["problems"] == []
    assert run.scalars["loss"] == pytest.approx([float(loss) for loss in losses])
    assert list(run.scalars["accuracy"]) == [0.25] * 3
    assert list(run.scalars["loss_scale"]) == [SCALE, SCALE, SCALE / 2]
    assert list(run.scalars["skipped"]) == [0, 1, 0]
    at = run.parameters.names.index("0.weight")
    head = run.modules.names.index("4")
    for row, scale in ((0, SCALE), (2, SCALE / 2)):
        arriving, weight = gradients[row]
        # Fused ones find them scaled, and divide by themselves.
        norm = np.linalg.norm(wide(weight) / (scale if fused else 1))
        found = run.parameters["grad_norm"][row, at] * (1 if fused else scale)
        assert found == pytest.approx(norm, rel=1e-5)
        norm = np.linalg.norm(wide(arriving) / scale)
        assert run.modules["output_grad_norm"][row, head] == pytest.approx(norm, rel=1e-5)
    for quantity in ("grad_norm", "update_norm", "grad_underflow_fraction"):
        assert np.isnan(run.parameters[quantity][1, at])


class Unrolled(nn.Module):
    """A cell, run once per time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(6, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [self.cell(x[0])]
        for value in x[1:]:
            states.append(self.cell(value, states[-1]))
        return states


def test_gradient_along_time(tmp_path: Path) -> None:
    def build() -> tuple[Unrolled, Tensor]:
        torch.manual_seed(0)
        return Unrolled(), torch.randn(5, 4, 6)

    twin, x = build()
    states = twin(x)
    for state in states:
        state.retain_grad()
    (states[-1].square().sum() * 1e20).backward()
    norms = [float(np.linalg.norm(wide(state.grad))) for state in states]

    model, x = build()
    optimizer = SGD(model.parameters(), 1e-22)
    with no_float64(), watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        loss = model(x)[-1].square().sum() * 1e20
        loss.backward()
        optimizer.step()
        scope.log(loss=loss)
        run = scope.run()
    assert run.meta["problems"] == []
    for quantity, norm in (("first", norms[0]), ("middle", norms[2]), ("last", norms[4])):
        found = run.modules[f"time_grad_{quantity}"][0, run.modules.names.index("cell")]
        assert found == pytest.approx(norm, rel=1e-5), quantity
    assert run.modules["time_steps"][0, run.modules.names.index("cell")] == 5


def test_clipping_and_the_criterions_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, criterion = mlp_model(), nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), 0.1)
    seen = []
    with (
        no_float64(),
        watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope,
    ):
        for limit in (1e-3, 1e3):
            x, y = vectors()
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            norm = scope.clip_grad_norm_(limit)
            seen.append((loss.detach(), norm, limit))
            optimizer.step()
        run = scope.run()
    assert run.meta["problems"] == []
    assert run.scalars["loss"] == pytest.approx([float(loss) for loss, _, _ in seen])
    before = [float(norm) for _, norm, _ in seen]
    assert run.scalars["grad_norm_before_clip"] == pytest.approx(before)
    assert run.scalars["grad_norm_after_clip"] == pytest.approx([1e-3, before[1]], rel=1e-3)
    assert list(run.scalars["clipped"]) == [1, 0]
    signals = run.signals
    assert signals["rms"][1, signals.names.index("input")] == pytest.approx(
        np.sqrt((wide(x) ** 2).mean()), rel=1e-5
    )


class Attentive(nn.Module):
    """Attention written out, and the fused one, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def projected(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embedding(tokens)
        return x, self.query(x), self.key(x)

    def forward(self, tokens: Tensor) -> Tensor:
        x, query, key = self.projected(tokens)
        weights = torch.softmax(query @ key.transpose(-1, -2), -1)
        return F.relu(weights @ x + F.scaled_dot_product_attention(query, key, x))


def test_functional_calls_attention_and_touched_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Attentive(), torch.randint(10, (3, 5))
    with torch.no_grad():
        _, query, key = (tensor.double().numpy() for tensor in model.projected(tokens))
    logits = query @ key.transpose(0, 2, 1)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    longest = np.linalg.norm(query, axis=-1).max(-1) * np.linalg.norm(key, axis=-1).max(-1)
    expected = {
        "attention_logit_max": logits.max(),
        "attention_entropy": -(weights * np.log(weights)).sum(-1).mean(),
        "attention_logit_bound": longest.max() / np.sqrt(8),
    }
    optimizer = SGD(model.parameters(), 0.1)
    with no_float64(), watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        loss = model(tokens).square().sum()
        loss.backward()
        optimizer.step()
        scope.log(loss=loss)
        run = scope.run()
    assert run.meta["problems"] == []
    for quantity, value in expected.items():
        assert np.nanmax(run.modules[quantity]) == pytest.approx(value, rel=1e-5), quantity
    at = run.parameters.names.index("embedding.weight")
    touched = len(torch.unique(tokens)) / 20
    assert run.parameters["grad_touched_fraction"][0, at] == pytest.approx(touched)
