"""A watched model under torch's transforms: results as of an unwatched one, nothing of it seen."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import watch
from tests.capture.test_transparency import bits
from tests.capture.trainings import mlp_model, vectors
from tests.setups.support import support
from tests.setups.twins import Subject, compared

# A hundred times what the training sees.
LARGE = torch.linspace(-100, 100, 18).reshape(3, 6)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model: nn.Module, given: dict[str, Tensor], x: Tensor) -> Tensor:
    out: Tensor = functional_call(model, given, (x,))
    return out.square().mean()


def under_grad(model: nn.Module) -> object:
    return grad(lambda w: loss(model, w, LARGE))(weights(model))


def per_sample(model: nn.Module) -> object:
    return vmap(grad(lambda w, x: loss(model, w, x)), (None, 0))(weights(model), LARGE)


def under_vmap(model: nn.Module) -> object:
    return vmap(model)(LARGE).detach()


def ensembled(model: nn.Module) -> object:
    stacked = {name: torch.stack([w, w * 2]) for name, w in weights(model).items()}
    return vmap(lambda w: loss(model, w, LARGE))(stacked)


def by_jacrev(model: nn.Module) -> object:
    return jacrev(model)(LARGE).detach()


def by_hessian(model: nn.Module) -> object:
    return hessian(lambda x: model(x).square().sum())(LARGE[0]).detach()


def forward_mode(model: nn.Module) -> object:
    value, slope = jvp(model, (LARGE,), (LARGE,))[:2]
    return [value.detach(), slope.detach()]


def by_vjp(model: nn.Module) -> object:
    out, pull = vjp(model, LARGE)[:2]
    return [out.detach(), pull(torch.ones_like(out))[0].detach()]


def traced(model: nn.Module) -> object:
    made = torch.jit.trace(model, LARGE)
    # Torch numbers the types that it makes.
    graph = re.sub(r"___torch_mangle_\d+\.", "", str(made.graph))
    return [graph, made(LARGE).detach(), made(LARGE[:1]).detach()]


def exported(model: nn.Module) -> object:
    made = torch.export.export(model, (LARGE,))
    return [str(made.graph), made.module()(LARGE).detach()]


def exported_strictly(model: nn.Module) -> object:
    made = torch.export.export(model, (LARGE,), strict=True)
    return [str(made.graph), made.module()(LARGE).detach()]


def made_into_a_graph(mode: Literal["real", "fake", "symbolic"]) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> object:
        given = weights(model)
        trace = make_fx(lambda w, x: functional_call(model, w, (x,)), tracing_mode=mode)
        made = trace(given, LARGE)
        return [made.code, made(given, LARGE).detach()]

    return run


def symbolically(model: nn.Module) -> object:
    made = symbolic_trace(model)
    return [made.code, made(LARGE).detach()]


def without_data(model: nn.Module) -> object:
    """As memory is estimated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = model(torch.empty(3, 6))
        return str(out.shape)


TRANSFORMS: dict[str, Callable[[nn.Module], object]] = {
    "`func.grad`": under_grad,
    "`vmap`": under_vmap,
    "`vmap` of `func.grad`, per sample": per_sample,
    "`vmap` over stacked weights": ensembled,
    "`func.jacrev`": by_jacrev,
    "`func.hessian`": by_hessian,
    "`func.jvp`": forward_mode,
    "`func.vjp`": by_vjp,
    "`jit.trace`": traced,
    "`torch.export`": exported,
    "`torch.export`, strict": exported_strictly,
    "`make_fx`": made_into_a_graph("real"),
    "`make_fx`, fake": made_into_a_graph("fake"),
    "`make_fx`, symbolic": made_into_a_graph("symbolic"),
    "`fx.symbolic_trace`": symbolically,
    "`FakeTensorMode`": without_data,
}

OF_FUNC = {
    under_grad,
    under_vmap,
    per_sample,
    ensembled,
    by_jacrev,
    by_hessian,
    forward_mode,
    by_vjp,
}
TOLD = "what runs inside torch.func transforms is not recorded"


def transforms() -> Iterator[Any]:
    for name, transform in TRANSFORMS.items():
        shown = support(
            "Autograd",
            f"{name} in between",
            parameters="right",
            outputs="right",
            output_gradients="right",
            note="what runs in it is not recorded",
        )
        yield pytest.param(transform, marks=shown, id=name)


# Torch's own, of what it has newer ways for, and of branches that a trace can't hold.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("transform", list(transforms()))
def test_result_is_the_same_and_training_is_not_polluted(
    transform: Callable[[nn.Module], object], tmp_path: Path
) -> None:
    def build() -> Subject:
        model = mlp_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        results: list[object] = []

        def body(number: int) -> None:
            x, y = vectors()
            optimizer.zero_grad()
            out = model(x)
            if number == 1:
                # While the hooks on the modules are there, and while they are not.
                results.append(transform(model))
            F.cross_entropy(out, y).backward()
            optimizer.step()
            if number == 1:
                results.append(transform(model))

        return Subject(model, [optimizer], body, lambda: bits(results))

    def reference() -> Subject:
        model = mlp_model()
        optimizer = SGD(model.parameters(), lr=0.1)

        def body(number: int) -> None:
            del number
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return Subject(model, [optimizer], body)

    told = [TOLD] if transform in OF_FUNC else []
    run = compared(build, tmp_path, reference=reference, problems=told)
    assert run.meta["coverage"]["modules"]["output_gradients_unseen"] == []


def by_hand(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, from `torch.func.grad` alone."""
    x, y = vectors()

    def objective(given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, given, (x,)), y)

    gradients: dict[str, Tensor] = grad(objective)(weights(model))
    return gradients


@support(
    "Autograd",
    "gradients by `func.grad` alone, assigned",
    parameters="right",
    outputs="unknown",
    output_gradients="unknown",
)
def test_a_loop_that_takes_its_gradients_inside_a_transform_is_told(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    norms = []
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(3):
            gradients = by_hand(model)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            norms.append({n: float(g.double().norm()) for n, g in gradients.items()})
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert run.steps.tolist() == [0, 1, 2]
    for row, expected in enumerate(norms):
        for name, norm in expected.items():
            found = run.parameters["grad_norm"][row, run.parameters.names.index(name)]
            assert found == pytest.approx(norm, rel=1e-5), name
    said = [problem["message"] for problem in run.meta["problems"]]
    assert said == [TOLD]


def told(folder: Path, every: int, within: Callable[[nn.Module, Tensor, int], object]) -> list[str]:
    """What is said of a training of three steps in whose forward this runs, too."""
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=folder, every=every) as scope:
        for number in range(3):
            x, y = vectors()
            out = model(x)
            within(model, x, number)
            F.cross_entropy(out, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=1.0)
        return [problem["message"] for problem in scope.run().meta["problems"]]


@pytest.mark.parametrize("runs", ["a part", "the model"])
def test_a_transform_within_a_step_is_told_once(runs: str, tmp_path: Path) -> None:
    def within(model: nn.Module, x: Tensor, number: int) -> Tensor:
        del number
        out: Tensor = vmap(model.get_submodule("0") if runs == "a part" else model)(x)
        return out

    assert told(tmp_path, 1, within).count(TOLD) == 1


def test_a_transform_in_steps_that_are_not_recorded_is_not_told(tmp_path: Path) -> None:
    assert told(tmp_path, 10, lambda model, x, number: number == 1 and vmap(model)(x)) == []


@support(
    "Autograd",
    "`jit.script`",
    parameters="right",
    note="after `close()`: torch scripts no model that has such hooks, and the error says so",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_says_what_to_do(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path) as scope:
        with pytest.raises(AttributeError, match=r"call gradscope's Scope.close\(\) before"):
            torch.jit.script(model)
        # A part has no hooks between recorded steps.
        torch.jit.script(model[0])
        scope.close()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(LARGE), model(LARGE))
