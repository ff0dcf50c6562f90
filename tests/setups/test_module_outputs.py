"""What can't be recorded of a module is said by name and with a reason, and costs nothing else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.trainings import vectors
from tests.setups.support import support
from tests.setups.twins import STEPS, Applied, Layers, Subject, classified, compared


def reasons(run: Run) -> Mapping[str, str]:
    found: Mapping[str, str] = run.meta["coverage"]["modules"]["reasons"]
    return found


# Outputs of other kinds than a floating tensor with a dimension.


def beside(make: Callable[[Tensor], object]) -> Subject:
    """A module whose output is not used."""

    def between(model: Any, x: Tensor) -> Tensor:
        model.side(x)
        return x

    return classified(Layers(between, side=Applied(make)))


MEASURED: dict[str, Callable[[Tensor], Tensor]] = {
    "detached outputs": torch.detach,
    "sparse outputs": lambda x: x.detach().to_sparse(),
    "float8 outputs": lambda x: x.detach().to(torch.float8_e4m3fn),
    "empty outputs": lambda x: x.detach()[:0],
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make, id=kind, marks=support("Modules", kind, parameters="right", outputs="right")
        )
        for kind, make in MEASURED.items()
    ],
)
def test_outputs_without_gradients_are_measured(
    make: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    run = compared(lambda: beside(make), tmp_path)
    assert run.modules.entities[run.modules.names.index("side")].type == "Applied"
    assert reasons(run) == {}


NOTHING = "it returns no floating-point tensor with a dimension"
UNMEASURED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "None": (lambda _: None, NOTHING),
    "text": (lambda _: "text", NOTHING),
    "a function": (lambda _: len, NOTHING),
    "integers": (lambda x: x.argmax(-1), NOTHING),
    "booleans": (lambda x: x > 0, NOTHING),
    "a single number": (torch.mean, NOTHING),
    "sparse rows": (lambda x: x.detach().to_sparse_csr(), "sparse_csr"),
    "a nested tensor": (lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]), "nested"),
    "a jagged tensor": (
        lambda x: torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged),
        "nested",
    ),
    "a tensor without data": (lambda x: torch.empty_like(x, device="meta"), "meta"),
}


# Torch's own, of what is new in it.
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            *case,
            id=kind,
            marks=support(
                "Modules", "outputs that are no dense floating tensor", outputs="unknown"
            ),
        )
        for kind, case in UNMEASURED.items()
    ],
)
def test_outputs_that_are_not_measured_are_named(
    make: Callable[[Tensor], object], reason: str, tmp_path: Path
) -> None:
    run = compared(lambda: beside(make), tmp_path, but=["side"])
    assert "side" not in run.modules.names
    assert list(reasons(run)) == ["side"]
    assert reason in reasons(run)["side"]


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*nested tensors")
@pytest.mark.parametrize("kind", ["sparse rows", "a nested tensor", "a tensor without data"])
def test_inputs_that_are_not_measured_cost_nothing_else(kind: str, tmp_path: Path) -> None:
    make, _ = UNMEASURED[kind]

    class Unpacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, odd: Tensor, x: Tensor) -> Tensor:
            del odd
            out: Tensor = self.linear(x)
            return out

    def build() -> Subject:
        model = Unpacking()
        odd = make(torch.ones(3, 4))
        assert isinstance(odd, Tensor)
        optimizer = SGD(model.parameters(), lr=0.1)

        def body(number: int) -> None:
            del number
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(odd, x), y).backward()
            optimizer.step()

        return Subject(model, [optimizer], body)

    compared(build, tmp_path)


# Gradients that do not come.


class Hiding(nn.Module):
    """A view that is changed in place: torch's hooks on it are not called."""

    def __init__(self, *, base_is_used: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.flat = Applied(lambda x: x.view(-1, 4))
        self.base_is_used = base_is_used

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        hidden = self.flat(first).relu_().view(-1, 8)
        out: Tensor = self.last(hidden + first if self.base_is_used else hidden)
        return out


@support(
    "Modules",
    "outputs that are views changed in place",
    parameters="right",
    outputs="right",
    output_gradients="unknown",
)
@pytest.mark.parametrize("base_is_used", [False, True])
def test_view_that_is_changed_in_place_is_named(base_is_used: bool, tmp_path: Path) -> None:
    def build() -> Subject:
        return classified(Hiding(base_is_used=base_is_used))

    # Its outputs are right, its gradients unknown: compared without them below.
    run = compared(build, tmp_path, but=["flat"])
    assert reasons(run) == {
        "flat": "it returns a view that is changed in place, or that the loss does not depend on"
    }
    coverage = run.meta["coverage"]["modules"]
    assert coverage["output_gradients_unseen"] == ["flat"]
    assert coverage["output_gradients_seen"] == coverage["output_gradients_expected"] - 1
    at, first = (run.modules.names.index(name) for name in ("flat", "first"))
    assert np.isnan(run.modules["output_grad_norm"][:, at]).all()
    np.testing.assert_array_equal(
        run.modules["output_std"][:, at], run.modules["output_std"][:, first]
    )


class Branching(nn.Module):
    """Parts whose output the loss does not depend on, or whose graph is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.unused, self.detached = nn.Linear(8, 8), nn.Linear(8, 8)
        self.without, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        self.view = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.unused(x)
        self.view(x)
        x = x + self.detached(x).detach()
        with torch.no_grad():
            aim = self.without(x)
        out: Tensor = self.last(x + aim)
        return out


@support(
    "Autograd",
    "detached branches, `no_grad` blocks in the forward",
    parameters="right",
    outputs="right",
    output_gradients="right",
    note="of what runs under `no_grad` nothing is recorded, which is said",
)
def test_what_the_loss_does_not_reach_is_named(tmp_path: Path) -> None:
    run = compared(lambda: classified(Branching()), tmp_path, but=["without", "never"])
    not_in_the_loss = "it returns what the loss does not depend on"
    assert reasons(run) == {
        "without": "it ran without gradients",
        "unused": not_in_the_loss,
        "detached": not_in_the_loss,
        "view": "it returns a view that is changed in place, or that the loss does not depend on",
    }
    assert run.meta["coverage"]["modules"]["never_ran"] == ["never"]
    assert np.isnan(run.modules["output_rms"][:, run.modules.names.index("without")]).all()


def test_layers_in_a_plain_list_are_named(tmp_path: Path) -> None:
    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 5)
            self.hidden = [nn.Linear(5, 5), nn.Tanh(), self.first]
            self.by_name = {"a": nn.Linear(5, 5)}
            self.teacher = (nn.Linear(5, 5).requires_grad_(False),)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.by_name["a"](self.hidden[1](self.hidden[0](self.first(x))))
            return out

    run = compared(lambda: classified(nn.Sequential(Listing())), tmp_path)
    said = "it is in a plain list or dict, and so no part of the model"
    assert reasons(run) == {"0.hidden[0]": said, "0.by_name['a']": said}


def test_hooks_on_parameters_and_inputs_do_not_pile_up(tmp_path: Path) -> None:
    """They outlive the step when they are what a module returns."""
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 6, requires_grad=True)
    weight = model[1].weight
    model.append(Applied(lambda y: y))
    model.append(Applied(lambda y: (weight, y)))
    model.append(Applied(lambda pair: pair[1] + pair[0].sum()))
    scope = watch(model, optimizer, log_dir=tmp_path, every=1)
    for _ in range(STEPS):
        model(x).sum().backward()
        assert len(x._backward_hooks or ()) == len(weight._backward_hooks or ()) == 1
        optimizer.step()
    scope.log(loss=0.0)
    scope.run()
    assert len(x._backward_hooks or ()) == len(weight._backward_hooks or ()) == 0
    model(x)
    assert len(x._backward_hooks or ()) == 1
    scope.close()
    assert len(x._backward_hooks or ()) == len(weight._backward_hooks or ()) == 0
