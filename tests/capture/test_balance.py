"""A bias's gradient beside what arrived at its layer's output, summed by hand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.trainings import Cnn, Reused, Tied, images, mlp_model, tokens, vectors

Step = Callable[[nn.Module, Optimizer], None]


def trained(model: nn.Module, step: Step, log_dir: Path, steps: int = 2) -> Run:
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=log_dir, every=1) as scope:
        for number in range(steps):
            torch.manual_seed(number)
            step(model, optimizer)
            scope.log(loss=1.0)
        run = scope.run()
    assert run.meta["problems"] == []
    return run


def found(run: Run, name: str) -> tuple[list[float], list[float]]:
    at = run.parameters.names.index(name)
    table = run.parameters
    return table["grad_balance"][:, at].tolist(), table["grad_balance_cosine"][:, at].tolist()


def backward(model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]] = vectors) -> None:
    x, y = batch()
    F.cross_entropy(model(x), y).backward()


def plainly(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Callable[[], tuple[Tensor, Tensor]] = vectors,
    change: Callable[[nn.Module], object] = lambda _: None,
) -> None:
    optimizer.zero_grad()
    backward(model, batch)
    change(model)
    optimizer.step()


def accumulating(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    for _ in range(3):
        backward(model)
    optimizer.step()


def after_a_saliency(model: nn.Module, optimizer: Optimizer) -> None:
    """Gradients for the input alone come to the outputs, and not to the bias."""
    optimizer.zero_grad()
    x, y = vectors()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [x])
    F.cross_entropy(model((x + 0.1 * gradient.sign()).detach()), y).backward()
    optimizer.step()


def cleared_between(model: nn.Module, optimizer: Optimizer, *, to_none: bool) -> None:
    optimizer.zero_grad(to_none)
    backward(model)
    optimizer.zero_grad(to_none)
    backward(model)
    backward(model)
    optimizer.step()


def twice_through(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    x, y = vectors()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def scale_gradients(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


SOUND: dict[str, tuple[Callable[[], nn.Module], Step, tuple[str, ...]]] = {
    "linear": (mlp_model, plainly, ("0.bias", "2.bias", "4.bias")),
    "float64": (
        partial(mlp_model, torch.float64),
        partial(plainly, batch=partial(vectors, torch.float64)),
        ("0.bias", "4.bias"),
    ),
    "convolution": (Cnn, partial(plainly, batch=images), ("conv2.bias", "head.bias")),
    "reused layer": (Reused, plainly, ("first.bias", "hidden.bias", "head.bias")),
    "accumulated": (mlp_model, accumulating, ("0.bias", "4.bias")),
    "after a saliency": (mlp_model, after_a_saliency, ("0.bias", "4.bias")),
    "cleared between, to None": (
        mlp_model,
        partial(cleared_between, to_none=True),
        ("0.bias", "4.bias"),
    ),
    "cleared between, to zero": (
        mlp_model,
        partial(cleared_between, to_none=False),
        ("0.bias", "4.bias"),
    ),
    "two backwards through one graph": (mlp_model, twice_through, ("0.bias", "4.bias")),
}


@pytest.mark.filterwarnings("ignore:gradscope")
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_step_is_in_balance(name: str, tmp_path: Path) -> None:
    build, step, biases = SOUND[name]
    torch.manual_seed(0)
    model = build()
    if name == "two backwards through one graph":
        optimizer = SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
            step(model, optimizer)
            run = scope.run()
    else:
        run = trained(model, step, tmp_path)
    for bias in biases:
        balance, cosine = found(run, bias)
        assert balance == pytest.approx([1.0] * len(balance), abs=1e-4)
        assert cosine == pytest.approx([1.0] * len(cosine), abs=1e-6)
    others = [n for n in run.parameters.names if not n.endswith("bias")]
    columns = [run.parameters.names.index(n) for n in others]
    assert np.isnan(run.parameters["grad_balance"][:, columns]).all()


@pytest.mark.parametrize("factor", [-1.0, 0.03, 64.0])
def test_what_is_done_to_the_gradients_is_the_balance(factor: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    step = partial(plainly, change=partial(scale_gradients, factor=factor))
    balance, cosine = found(trained(mlp_model(), step, tmp_path), "2.bias")
    assert balance == pytest.approx([factor] * 2, rel=1e-4)
    assert cosine == pytest.approx([np.sign(factor)] * 2, abs=1e-6)


def test_gradients_that_are_not_cleared_are_something_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    sums: list[Tensor] = []
    given: list[Tensor] = []

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        x, y = vectors()
        out = model(x)
        loss = F.cross_entropy(out, y)
        (arriving,) = torch.autograd.grad(loss, [out], retain_graph=True)
        sums.append(arriving.double().sum(0))
        loss.backward()
        assert isinstance(model[4].bias.grad, Tensor)  # type: ignore[index]
        given.append(model[4].bias.grad.double().clone())  # type: ignore[index]
        optimizer.step()

    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for number in range(3):
            torch.manual_seed(number)
            step(model, optimizer)
        run = scope.run()
    balance, cosine = found(run, "4.bias")
    for row, (total, gradient) in enumerate(zip(sums, given, strict=True)):
        product = float(total @ gradient)
        assert balance[row] == pytest.approx(product / float(total @ total), rel=1e-4)
        assert cosine[row] == pytest.approx(
            product / float(total.norm() * gradient.norm()), rel=1e-4
        )
    assert abs(cosine[2]) < 0.99


@pytest.mark.parametrize("is_given", [True, False], ids=["scaler given", "scaler not given"])
def test_the_loss_scale_is_removed_or_there_is_no_number(is_given: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    given = scaler if is_given else None
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=given) as scope:
        for number in range(4):
            torch.manual_seed(number)
            x, y = vectors()
            optimizer.zero_grad()
            # The second overflows.
            factor = torch.inf if number == 1 else 1.0
            scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        balance, cosine = found(scope.run(), "2.bias")
    if is_given:
        assert balance[::3] == pytest.approx([1.0, 1.0], abs=1e-4)
        assert cosine[::3] == pytest.approx([1.0, 1.0], abs=1e-6)
        # Nor after it, as no step of an optimizer shows what was computed since.
        assert np.isnan([balance[1:3], cosine[1:3]]).all()
    else:
        assert np.isnan(balance).all()
        assert np.isnan(cosine).all()


def test_autocast_rounds_and_stays_in_balance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cnn()

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        x, y = images()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    run = trained(model, step, tmp_path)
    for bias in ("conv2.bias", "head.bias"):
        balance, cosine = found(run, bias)
        assert balance == pytest.approx([1.0, 1.0], abs=8e-3)
        assert cosine == pytest.approx([1.0, 1.0], abs=1e-4)


class Checkpointed(nn.Module):
    """One layer, once by itself and once in a checkpoint."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        x = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(torch.tanh(x))
        return out


class Scaled(nn.Linear):
    """What it does to the bias is its own business."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)
        return out


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(x)
        return out


class Replaced(nn.Module):
    """Its layer also runs with weights that are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        others = {"weight": self.one.weight * 2, "bias": self.one.bias * 3}
        out: Tensor = self.one(x) + functional_call(self.one, others, (x,))
        return out


class Functional(nn.Module):
    """Its layer's weights are also used without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(F.linear(torch.tanh(self.one(x)), self.one.weight, self.one.bias))
        return out


class Detached(nn.Module):
    """One of two uses of its layer leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.one(x).detach()
        return out


def normalized() -> nn.Module:
    """The bias before the norm has no gradient but for rounding."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "re-entrant checkpoint": (partial(Checkpointed, reentrant=True), "layer.bias"),
    "own forward": (lambda: nn.Sequential(Scaled(6, 5)), "0.bias"),
    "shared bias": (SharedBias, "one.bias"),
    "used as a function, too": (Functional, "one.bias"),
    "other weights": (Replaced, "one.bias"),
    "a use without a gradient": (Detached, "one.bias"),
    "nothing but rounding": (normalized, "0.bias"),
}


@pytest.mark.filterwarnings("ignore:gradscope")
@pytest.mark.parametrize("name", UNKNOWN)
def test_no_number_where_a_use_may_be_missing(name: str, tmp_path: Path) -> None:
    build, bias = UNKNOWN[name]
    torch.manual_seed(0)
    balance, cosine = found(trained(build(), plainly, tmp_path), bias)
    assert np.isnan(balance).all()
    assert np.isnan(cosine).all()


def test_a_checkpoint_that_is_followed_counts_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    balance, cosine = found(trained(Checkpointed(reentrant=False), plainly, tmp_path), "layer.bias")
    assert balance == pytest.approx([1.0, 1.0], abs=1e-4)
    assert cosine == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_part_that_ran_before_the_model_is_not_taken_for_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reused()

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        x, y = vectors()
        optimizer.zero_grad()
        early = model.first(x)  # type: ignore[operator]
        (F.cross_entropy(model(x), y) + early.square().mean()).backward()
        optimizer.step()

    balance, _ = found(trained(model, step, tmp_path, steps=3), "first.bias")
    assert np.isnan(balance).all()


def test_tied_embeddings_do_not_matter_to_a_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    balance, _ = found(trained(Tied(), partial(plainly, batch=tokens), tmp_path), "hidden.bias")
    assert balance == pytest.approx([1.0, 1.0], abs=1e-4)


def test_a_hook_of_the_users_may_have_changed_the_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    model[2].register_forward_hook(lambda *given: given[2] * 2)
    run = trained(model, plainly, tmp_path)
    assert np.isnan(found(run, "2.bias")[0]).all()
    assert found(run, "4.bias")[0] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_of_many_layers_eight_are_looked_at_from_first_to_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), *(nn.Linear(5, 5) for _ in range(19)))
    run = trained(model, plainly, tmp_path)
    known = ~np.isnan(run.parameters["grad_balance"][0])
    names = [name for name, is_known in zip(run.parameters.names, known, strict=True) if is_known]
    assert len(names) == 8
    assert names[0] == "0.bias"
    assert names[-1] == "19.bias"
    assert run.parameters["grad_balance"][0][known] == pytest.approx(np.ones(8), abs=1e-3)


def test_level_parameters_looks_at_none(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level="parameters") as scope:
        for _ in range(2):
            plainly(model, optimizer)
        table = scope.run().parameters
    for quantity in ("grad_balance", "grad_previous_cosine", "duplicate_rows_fraction"):
        assert np.isnan(table[quantity]).all()
