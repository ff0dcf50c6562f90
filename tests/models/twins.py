"""One training three times over: by itself, measured with numpy, and watched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gradscope.capture.scope import Scope, watch
from gradscope.record import Run
from tests.capture.reference import assert_equal
from tests.models.subjects import Subject
from tests.setups.received import assert_describes, entries
from tests.setups.reference_loops import F64, Received

STEPS = 3
# The updates of larger parameters are measured on a sample of their entries.
EXACT_UPTO = 32_768

Step = Callable[[Subject, nn.Module, Optimizer], Tensor]
Prepare = Callable[[nn.Module], object]


def plain_step(subject: Subject, model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = subject.loss(model, subject.batch())
    loss.backward()
    optimizer.step()
    return loss


@dataclass(frozen=True)
class Training:
    """A model with its optimizer, and the body of the loop; the same each time it is built."""

    subject: Subject
    step: Step = plain_step
    prepare: Prepare = lambda _: None

    def built(self) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = self.subject.build().train()
        self.prepare(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        return model, AdamW(trainable, lr=1e-3)

    def bare(self) -> "Bare":
        """Nobody looks."""
        model, optimizer = self.built()
        for _ in range(STEPS):
            self.step(self.subject, model, optimizer)
        return Bare(model, bits(model))

    def measured(self) -> "Measured":
        model, optimizer = self.built()
        measured = Measured(model, Received(model, [optimizer]))
        for _ in range(STEPS):
            measured.step_begins()
            self.step(self.subject, model, optimizer)
            measured.received.step_ends()
        return measured

    def watched(self, folder: Path) -> "Watched":
        model, optimizer = self.built()
        with watch(model, optimizer, log_dir=folder, every=1) as scope:
            for _ in range(STEPS):
                scope.log(loss=self.step(self.subject, model, optimizer))
            after = bits(model)
            return Watched(model, optimizer, scope, scope.run(), after)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes."""
    return {
        **{name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "(random numbers)": torch.get_rng_state(),
    }


def assert_same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@dataclass(frozen=True)
class Bare:
    model: nn.Module
    bits: Mapping[str, Tensor]


@dataclass(frozen=True)
class Watched:
    model: nn.Module
    optimizer: Optimizer
    scope: Scope
    run: Run
    bits: Mapping[str, Tensor]


@dataclass
class Pass:
    """The outputs of all module uses in one step, and the gradients arriving there."""

    uses: dict[str, int] = field(default_factory=dict)
    # One array per forward and backward: together they are one sample.
    outputs: dict[str, list[F64]] = field(default_factory=dict)
    gradients: dict[str, list[F64]] = field(default_factory=dict)


class Measured:
    """What the modules return and receive, by hooks of its own on each of them."""

    def __init__(self, model: nn.Module, received: Received) -> None:
        self.model = model
        self.received = received
        self.ran: set[str] = set()
        self.passes: list[Pass] = []
        model.register_forward_pre_hook(self._forward_begins)
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._see, name or "(root)"))

    def step_begins(self) -> None:
        self.passes.append(Pass())

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        del module, args
        self.passes[-1].uses.clear()

    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        # An evaluation belongs to no step.
        if not torch.is_grad_enabled():
            return
        self.ran.add(name)
        current = self.passes[-1]
        use = current.uses.get(name, 0)
        current.uses[name] = use + 1
        tensor = _floating(output)
        if tensor is not None:
            label = f"{name}#{use}" if use else name
            current.outputs.setdefault(label, []).append(entries(tensor))
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(partial(_keep, current, label))


def _keep(current: Pass, label: str, gradient: Tensor) -> None:
    current.gradients.setdefault(label, []).append(entries(gradient))


def _floating(output: Any) -> Tensor | None:
    """The first tensor of fractions, other than a loss, that a library's model returns."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.dim() else None
    values = output.values() if isinstance(output, dict) else output
    parts = values if isinstance(output, (dict, tuple, list)) else ()
    return next((found for part in parts if (found := _floating(part)) is not None), None)


def watched_names(model: nn.Module) -> set[str]:
    """Leaves, members of ModuleList and Sequential, and the model itself."""
    names = {"(root)"}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        # torch's attention uses its parts as containers of weights.
        is_leaf = not list(module.children()) or isinstance(module, nn.MultiheadAttention)
        is_member = isinstance(parent, (nn.ModuleList, nn.Sequential))
        is_part = isinstance(parent, nn.MultiheadAttention)
        if name and not is_list and not is_part and (is_leaf or is_member):
            names.add(name)
    return names


def assert_measured(run: Run, measured: Measured) -> None:
    """Gradients, updates, outputs and output gradients, every step, against numpy's."""
    steps = measured.received.steps
    exact = [name for name, p in measured.model.named_parameters() if p.numel() <= EXACT_UPTO]
    assert exact
    assert_equal(run.parameters, steps, quantities=("grad_norm", "grad_mean", "grad_absmax"))
    small = [{name: numbers[name] for name in exact} for numbers in steps]
    assert_equal(run.parameters, small, quantities=["update_norm"])
    if len(exact) < len(run.parameters.names):
        assert "on a fixed sample" in run.meta["sampling"]
        assert_equal(run.parameters, steps, quantities=["update_norm"], rtol=0.05)
    assert list(run.modules.steps) == list(range(len(measured.passes)))
    names = watched_names(measured.model)
    for row, current in enumerate(measured.passes):
        wanted = {label for label in current.outputs if label.partition("#")[0] in names}
        assert wanted
        known = ~np.isnan(run.modules["output_rms"][row])
        assert wanted == {
            entity.name
            for entity, is_known in zip(run.modules.entities, known, strict=True)
            # Of functions that are called tests/setups/test_functional.py knows.
            if is_known and entity.kind == "module"
        }
        for label in wanted:
            outputs = np.concatenate(current.outputs[label])
            assert_describes(run.modules, "output_", row, label, outputs)
            if label in current.gradients:
                gradients = np.concatenate(current.gradients[label])
                assert_describes(run.modules, "output_grad_", row, label, gradients)
            else:
                column = run.modules.names.index(label)
                assert np.isnan(run.modules["output_grad_norm"][row, column])
