"""Whatever autograd is made to do: what is recorded is what arrived, and what was used."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam

from gradscope.capture.scope import watch
from tests.capture.trainings import mlp_model, vectors
from tests.setups.support import support
from tests.setups.twins import Applied, Layers, Subject, classified, compared, loss_of, stepped

Build = Callable[[], Subject]


# Functions of the user's own.


class Scale(torch.autograd.Function):
    """Its gradient is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx
        return gradients[0] * -0.5


class Pass(Scale):
    """Returns its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x


class Write(Scale):
    """Writes into its input, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


class View(Scale):
    """Returns a view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)


def custom(function: type[torch.autograd.Function]) -> Subject:
    def between(model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.act(model.custom(x))
        return out

    apply = Applied(function.apply)
    return classified(Layers(between, custom=apply, act=nn.Tanh()))


# Other ways to a gradient.


def smooth() -> nn.Module:
    """Of activations that torch differentiates by their input.

    Of tanh, by its output: the second derivative then comes to that, and not by way of a copy.
    """
    return nn.Sequential(
        nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 5)
    )


def by_autograd_grad() -> Subject:
    """`.grad` is filled by hand."""

    def differentiate(model: nn.Module) -> None:
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss_of(model), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return stepped(mlp_model(), differentiate)


def penalized() -> Subject:
    """The gradient of a gradient, as in WGAN-GP."""

    def differentiate(model: nn.Module) -> None:
        x, y = vectors()
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()

    return stepped(smooth(), differentiate)


def penalized_by_parameters() -> Subject:
    def differentiate(model: nn.Module) -> None:
        loss = loss_of(model)
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(slope.square().sum() for slope in slopes)).backward()

    return stepped(smooth(), differentiate)


def with_a_graph() -> Subject:
    """Gradients that could be differentiated further."""

    def differentiate(model: nn.Module) -> None:
        loss_of(model).backward(create_graph=True)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.detach()

    return stepped(mlp_model(), differentiate)


def of_some_parameters() -> Subject:
    """`backward(inputs=...)`."""
    return stepped(
        mlp_model(),
        lambda m: loss_of(m).backward(inputs=[p for p in m.parameters() if p.dim() > 1]),
    )


def in_a_thread() -> Subject:
    def differentiate(model: nn.Module) -> None:
        loss = loss_of(model)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    return stepped(mlp_model(), differentiate)


def found_anomalies() -> Subject:
    def differentiate(model: nn.Module) -> None:
        with torch.autograd.set_detect_anomaly(True):
            loss_of(model).backward()

    return stepped(mlp_model(), differentiate)


def kept_elsewhere() -> Subject:
    def differentiate(model: nn.Module) -> None:
        with save_on_cpu():
            loss_of(model).backward()

    return stepped(mlp_model(), differentiate)


def packed() -> Subject:
    """What is saved for backward is halved in precision; the packing runs a forward, too."""

    def differentiate(model: nn.Module) -> None:
        def pack(x: Tensor) -> Tensor:
            return x.to(torch.bfloat16) if x.is_floating_point() else x

        def unpack(x: Tensor) -> Tensor:
            return x.to(torch.float32) if x.is_floating_point() else x

        with saved_tensors_hooks(pack, unpack):
            loss = loss_of(model)
        loss.backward()

    return stepped(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), differentiate)


def masked() -> Subject:
    """`functional_call` with parameters made of the model's own."""

    def differentiate(model: nn.Module) -> None:
        made = {name: p * (p.abs() > 0.1) for name, p in model.named_parameters()}
        x, y = vectors()
        F.cross_entropy(functional_call(model, made, (x,)), y).backward()

    return stepped(mlp_model(), differentiate)


def learning_to_learn() -> Subject:
    """An inner step on weights of its own, and the gradient through it, as in MAML."""

    def differentiate(model: nn.Module) -> None:
        weights: dict[str, Tensor] = dict(model.named_parameters())
        x, y = vectors()
        inner = F.cross_entropy(functional_call(model, weights, (x,)), y)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = {
            name: weight - 0.1 * slope
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        x, y = vectors()
        F.cross_entropy(functional_call(model, moved, (x,)), y).backward()

    return stepped(mlp_model(), differentiate)


def evaluated() -> Subject:
    """Inference mode and `no_grad`, wherever they fit."""
    model = mlp_model()
    optimizer = Adam(model.parameters())

    def evaluate() -> None:
        for mode in (torch.inference_mode, torch.no_grad):
            model.eval()
            with mode():
                model(torch.full((2, 6), 100.0))
            model.train()

    def body(number: int) -> None:
        del number
        evaluate()
        loss = loss_of(model)
        evaluate()
        optimizer.zero_grad()
        loss.backward()
        evaluate()
        optimizer.step()

    return Subject(model, [optimizer], body)


WAYS: dict[str, Build] = {
    "custom `autograd.Function`": lambda: custom(Scale),
    "custom function that returns its input": lambda: custom(Pass),
    "custom function that writes into its input": lambda: custom(Write),
    "custom function that returns a view": lambda: custom(View),
    "`autograd.grad` without backward": by_autograd_grad,
    "double backward, on the input": penalized,
    "double backward, on the parameters": penalized_by_parameters,
    "`backward(create_graph=True)`": with_a_graph,
    "`backward(inputs=...)`": of_some_parameters,
    "backward in another thread": in_a_thread,
    "anomaly detection": found_anomalies,
    "`save_on_cpu`": kept_elsewhere,
    "`saved_tensors_hooks`": packed,
    "`functional_call`": masked,
    "`functional_call`, a step within a step": learning_to_learn,
    "inference mode, `no_grad` in between": evaluated,
}


def ways() -> Iterator[Any]:
    for way, build in WAYS.items():
        shown = support(
            "Autograd", way, parameters="right", outputs="right", output_gradients="right"
        )
        yield pytest.param(build, marks=shown, id=way)


# Torch's own.
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Using backward")
@pytest.mark.parametrize("build", list(ways()))
def test_is_recorded_as_it_was(build: Build, tmp_path: Path) -> None:
    run = compared(build, tmp_path)
    assert run.meta["coverage"]["modules"]["output_gradients_unseen"] == []


def test_gradient_of_a_gradient_alone_is_not_the_losses(tmp_path: Path) -> None:
    """A step in which nothing but derivatives were asked for."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        x = torch.ones(2, 6, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
        optimizer.step()
        scope.log(loss=0.0)
        run = scope.run()
    assert np.isnan(run.modules["output_grad_norm"]).all()
    said = run.meta["coverage"]["modules"]["reasons"]
    assert set(said) == set(run.modules.names)
    assert set(said.values()) == {"it is reached by torch.autograd.grad(create_graph=True) alone"}
