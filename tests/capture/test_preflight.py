"""A look before training: what it sees, what it finds, and that it leaves no trace."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradscope
from gradscope.analysis.finding import Severity
from gradscope.analysis.report import Report
from gradscope.capture.preflight import preflight
from gradscope.errors import ConfigError
from gradscope.testing import assert_healthy
from tests.capture.test_bad_input import hooks_of
from tests.capture.trainings import mlp_model, vectors


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity > Severity.INFO}


class Drawing(nn.Module):
    """Dropout, running statistics, numbers of three generators, an input changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1 + 0.01 * random.random() * np.random.rand())  # noqa: NPY002, S311
        hidden: Tensor = F.dropout(self.norm(self.first(x)).relu(), training=self.training)
        out: Tensor = self.last(hidden)
        return out


def random_states() -> tuple[Any, ...]:
    of_numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), str(of_numpy)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    of_optimizer = [v for s in optimizer.state.values() for v in s.values()]
    return [None if t is None else t.detach().clone() for t in (*tensors, *of_optimizer)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def test_nothing_changes_by_one_bit() -> None:
    model = Drawing()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    F.cross_entropy(model(x.clone()), y).backward()
    optimizer.step()
    kept, drawn, given = state(model, optimizer), random_states(), x.clone()
    gradients = [p.grad for p in model.parameters()]
    hooks, modes = hooks_of(model), [module.training for module in model.modules()]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        # Reaches the model itself, not the copy.
        decay = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(output, target) + decay

    report = preflight(model, (x, y), loss_fn, optimizer)
    assert report.run.recorded_steps.tolist() == [0, 1, 2]
    assert same(state(model, optimizer), kept)
    # The very tensors, too.
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert random_states() == drawn
    assert torch.equal(x, given)
    assert hooks_of(model) == hooks
    assert [module.training for module in model.modules()] == modes


def test_nothing_changes_where_the_model_fails() -> None:
    model = Drawing()
    optimizer = torch.optim.Adam(model.parameters())
    batch = (torch.randn(4, 7), torch.zeros(4))
    kept, drawn, hooks = state(model, optimizer), random_states(), hooks_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failed:
        preflight(model, batch, F.cross_entropy, optimizer)
    assert failed.value.__notes__ == [
        "raised in gradscope.preflight, with batch=(Tensor(4, 7), Tensor(4,))"
    ]
    assert same(state(model, optimizer), kept)
    assert random_states() == drawn
    assert hooks_of(model) == hooks


def test_the_numbers_are_those_of_the_models_own_backward() -> None:
    model = mlp_model()
    x, y = vectors()
    run = preflight(model, (x, y), F.cross_entropy, torch.optim.Adam(model.parameters())).run
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    np.testing.assert_allclose(run.scalars["loss"], [loss.item()] * 3, rtol=1e-6)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        found = run.parameters["grad_norm"][:, run.parameters.names.index(name)]
        np.testing.assert_allclose(found, [gradient.double().norm().item()] * 3, rtol=1e-5)
    # No step was taken, and nothing is claimed of any.
    for quantity in run.parameters.quantities:
        if quantity.startswith("update_"):
            assert np.isnan(run.parameters[quantity]).all()
    assert run.meta["coverage"]["optimizers"][0]["type"] == "Adam"
    assert run.meta["coverage"]["optimizers"][0]["lr"] == 1e-3


def test_it_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = preflight(mlp_model(), vectors(), F.cross_entropy)
    gc.collect()
    assert report.run.meta["log_dir"] is None
    assert list(tmp_path.iterdir()) == []


# What it finds.


def sigmoids(depth: int = 12) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def dead() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.constant_(model[0].bias, -100.0)  # type: ignore[arg-type]
    return model


class Severed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).detach())
        return out


BATCH = (torch.randn(256, 16, generator=torch.Generator().manual_seed(1)), torch.arange(256) % 3)


@pytest.mark.parametrize(
    ("build", "code"),
    [(lambda: sigmoids(20), "GS101"), (dead, "GS301"), (Severed, "GS002")],
)
def test_faults_that_are_there_from_the_beginning(
    build: Callable[[], nn.Module], code: str
) -> None:
    model = build()
    report = preflight(model, BATCH, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert code in codes(report)


def test_a_loss_without_a_value() -> None:
    model = mlp_model()
    x, y = vectors()
    report = preflight(model, (x, y), lambda output, target: F.cross_entropy(output, target).log_())
    assert report.healthy
    bad = preflight(model, (x * float("nan"), y), F.cross_entropy)
    assert codes(bad) & {"GS501", "GS503"}


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: [o]])
def test_parameters_that_no_optimizer_holds(wrap: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    half = torch.optim.SGD(model[2].parameters(), 0.1)
    report = preflight(model, BATCH, F.cross_entropy, wrap(half))
    (found,) = (f for f in report.findings if f.code == "GS004")
    assert "0.weight, 0.bias" in found.message
    rest = torch.optim.SGD(model[0].parameters(), 0.1)
    assert not codes(preflight(model, BATCH, F.cross_entropy, [half, rest]))
    # Of an optimizer that isn't named nothing is known.
    assert not codes(preflight(model, BATCH, F.cross_entropy))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(128, 3),
    )


def beginning_at_zero() -> nn.Module:
    """The first gradients of its first layer are zero: as of LoRA, and heads that begin so."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    return model


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x[:, None].expand(-1, 5, -1)).mean(1))
        return out


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)),
        lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3)),
        convolutions,
        beginning_at_zero,
        Transformer,
    ],
)
def test_a_healthy_model_is_silent(build: Callable[[], nn.Module]) -> None:
    model = build()
    report = preflight(model, BATCH, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert_healthy(report)
    # Rules on steps weren't asked.
    assert not {"GS401", "GS402", "GS204"} & {rule.code for rule in report.rules}


def test_a_compiled_model_with_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    whole: Any = torch.compile(model, backend="eager")
    report = preflight(whole, BATCH, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1))
    assert_healthy(report)
    assert list(report.run.parameters.names) == ["0.weight", "0.bias", "2.bias"]


# Batches and losses of several kinds.


class WithLoss(nn.Module):
    """As transformers' models: an output that has the loss in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.inner(x)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(y)
        return out


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


X, Y = BATCH
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, Any, Any]] = {
    "mapping": (WithLoss, {"x": X, "labels": Y}, None, None),
    "all inputs": (WithLoss, (X, Y), None, None),
    "two inputs": (Pair, [X, X, Y], F.cross_entropy, None),
    "forward": (sigmoids, (X, Y), None, mean_loss),
    "mapping and loss_fn": (
        WithLoss,
        {"x": X, "labels": Y},
        lambda output, batch: F.cross_entropy(output.logits, batch["labels"]),
        None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind(kind: str) -> None:
    build, batch, loss_fn, forward = KINDS[kind]
    model = build()
    run = preflight(model, batch, loss_fn, forward=forward).run
    apart = copy.deepcopy(model)
    if isinstance(apart, WithLoss):
        expected = apart(X, Y).loss
    else:
        expected = F.cross_entropy(apart(X, X) if isinstance(apart, Pair) else apart(X), Y)
    np.testing.assert_allclose(run.scalars["loss"], [expected.item()] * 3, rtol=1e-6)
    assert (run.parameters["grad_missing"] == 0).all()


class Stuck(nn.Module):
    """Keeps its last output, which can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        out: Tensor = self.last
        return out


def stuck() -> nn.Module:
    model = Stuck()
    model(X)
    return model


def linear() -> nn.Module:
    return nn.Linear(16, 3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "no target": (linear, X, F.cross_entropy, r"batch=Tensor\(256, 16\) must be .inputs…, target"),
    "one of a tuple": (linear, (X,), F.cross_entropy, r"batch=\(Tensor\(256, 16\)\) must be"),
    "no loss": (linear, (X,), None, r"returned Tensor\(256, 3\) without a loss.*give loss_fn"),
    "not reduced": (
        linear,
        BATCH,
        nn.CrossEntropyLoss(reduction="none"),
        r"shape \(256,\).*loss\.mean",
    ),
    "a number": (linear, BATCH, lambda o, y: F.cross_entropy(o, y).item(), "the loss is float"),
    "no gradient": (linear, BATCH, lambda o, y: F.cross_entropy(o.detach(), y), r"\.detach\(\)"),
    "no copy": (stuck, BATCH, F.cross_entropy, "the Stuck can't be copied.*before its first"),
    "nothing trainable": (
        lambda: linear().requires_grad_(False),
        BATCH,
        F.cross_entropy,
        "no trainable parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_work_is_refused_in_words(case: str) -> None:
    build, batch, loss_fn, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        preflight(build(), batch, loss_fn)


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = torch.optim.SGD(linear().parameters(), 0.1)
    with pytest.raises(ConfigError, match="holds none of the Linear's parameters"):
        preflight(linear(), BATCH, F.cross_entropy, other)


# assert_healthy.


def test_a_sick_report_is_not_healthy_unless_it_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    half = torch.optim.SGD(model[2].parameters(), 0.1)
    report = gradscope.preflight(model, BATCH, F.cross_entropy, half)
    with pytest.raises(AssertionError, match=r"not-in-optimizer(.|\n)*0\.weight"):
        assert_healthy(report)
    with pytest.raises(AssertionError):
        assert_healthy(report.run, ignore=["GS1"])
    for accepted in ("GS004", "GS0", "not-in-optimizer"):
        assert_healthy(report, ignore=["GS101", accepted])
    with pytest.raises(ConfigError, match="did you mean 'GS004'"):
        assert_healthy(report, ignore=["GS0004"])


def test_silence_about_nothing_is_not_health() -> None:
    with gradscope.watch(linear()) as scope:
        pass
    with pytest.raises(AssertionError, match="nothing-recorded"):
        assert_healthy(scope.run())
    with pytest.raises(AssertionError, match="No verdict"):
        assert_healthy(gradscope.analyze(scope.run(), rules=[]))
