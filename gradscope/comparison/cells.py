"""All cells of one seed, or some of them: what one worker does."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture.outputs import tensors
from gradscope.capture.trial import (
    applied,
    checked,
    cloned,
    copied,
    noted,
    same_gradients,
    same_random_numbers,
)
from gradscope.comparison.activation import (
    ACTIVATIONS,
    Activation,
    ActivationFunction,
    activation_called,
)
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import (
    CustomInitialization,
    initialization_called,
    initialize,
)
from gradscope.comparison.measure import Setting, measured
from gradscope.comparison.mitigation import (
    Change,
    Mitigation,
    effect,
    mitigation_called,
    prepare,
)
from gradscope.comparison.result import Cell, Name
from gradscope.comparison.sites import Sites, look_for_sites
from gradscope.comparison.swapping import Swapped, swapping
from gradscope.comparison.training import trained
from gradscope.errors import ConfigError

ModelOrFactory = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, eq=False, slots=True)
class Subject:
    """The user's model, or what makes it, and how its loss comes about."""

    model: ModelOrFactory
    batch: Any
    loss_fn: Callable[..., Tensor] | None = None
    forward: Callable[[nn.Module, Any], Tensor] | None = None

    def made(self, seed: int) -> nn.Module:
        """A model of one's own, in train mode, its dropout at 0."""
        if isinstance(self.model, nn.Module):
            model = copied(self.model)
        else:
            torch.manual_seed(seed)
            model = self.model()
            if not isinstance(model, nn.Module):
                message = (
                    f"model_or_factory returned {type(model).__name__}; a factory takes no "
                    "argument and returns an nn.Module"
                )
                raise ConfigError(message)
        model.train()
        for module in model.modules():
            _without_dropout(module)
        return model

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of the batch: one number with a gradient, or ConfigError."""
        with noted("compare", self.batch):
            batch = cloned(self.batch)
            if self.forward is not None:
                return checked(self.forward(model, batch))
            return checked(applied(model, batch, self.loss_fn)[2])

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Inside, gradients are on, and what draws or backpropagates leaves nothing behind.

        The user's loss may reach the model itself.
        """
        model = self.model if isinstance(self.model, nn.Module) else nn.Identity()
        with same_random_numbers(model), same_gradients(model), torch.enable_grad():
            yield

    @property
    def samples(self) -> int | None:
        """The batch size, if the first tensor tells it."""
        first = next(tensors(self.batch), None)
        return len(first) if first is not None and first.dim() else None


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001  (their common class)
        module.p = 0.0
    elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        module.dropout = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Choices:
    """What is compared, under the names that stand for it: names or functions of the user's."""

    initializations: Mapping[str, str | CustomInitialization]
    activations: Mapping[str, str | ActivationFunction | Activation]
    mitigations: Mapping[str, str | Change | Mitigation]

    def names(self) -> list[Name]:
        """The whole grid."""
        return [
            Name(initialization, activation, mitigation)
            for mitigation in self.mitigations
            for activation in self.activations
            for initialization in self.initializations
        ]


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """Some cells of one seed. threads: torch's, so that every worker gets the same numbers."""

    subject: Subject
    choices: Choices
    names: tuple[Name, ...]
    seed: int
    train_steps: int = 0
    threads: int = 1


@dataclass(slots=True)
class Outcome:
    """What became of a task."""

    cells: list[Cell] = field(default_factory=list)
    left_out: dict[Name, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


def run(task: Task) -> Outcome:
    """All cells of a task; a worker's whole work."""
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        outcome = Outcome()
        for part in cells(task):
            merge(outcome, part)
        return outcome
    finally:
        torch.set_num_threads(before)


def merge(whole: Outcome, part: Outcome) -> None:
    """Add what a part has."""
    whole.cells += part.cells
    whole.left_out |= part.left_out
    whole.left |= part.left
    whole.notes |= part.notes


def cells(task: Task) -> Iterator[Outcome]:
    """Cell by cell. No random state has moved after any of them."""
    draws = Draws(task.seed)
    by_mitigation: dict[str, list[Name]] = {}
    for name in task.names:
        by_mitigation.setdefault(name.mitigation, []).append(name)
    for mitigation, names in by_mitigation.items():
        stand = None
        for name in names:
            with task.subject.unmoved():
                if stand is None:
                    stand = _Stand(task, mitigation)
                made = stand.cell(name, draws)
            yield made


class _Stand:
    """A copy of the model with one mitigation, on which configurations are put one by one."""

    def __init__(self, task: Task, mitigation: str) -> None:
        self._task = task
        self._mitigation = mitigation_called(task.choices.mitigations[mitigation])
        self.model = task.subject.made(task.seed)
        self._sites = self._looked()
        self._prepare()
        self._start = copy.deepcopy(self.model.state_dict())

    def _prepare(self) -> None:
        self._reason = effect(self.model, self._sites, self._mitigation).reason
        if self._reason is None:
            self.model = prepare(self.model, self._sites, self._mitigation)
            if self._mitigation.change is not None:
                self._sites = self._looked()

    def _looked(self) -> Sites:
        return look_for_sites(self.model, lambda: self._task.subject.loss(self.model))

    def cell(self, name: Name, draws: Draws) -> Outcome:
        """One configuration, measured and trained."""
        if self._reason is not None:
            return Outcome(left_out={name: self._reason})
        task, model = self._task, self.model
        activation = None
        if name.activation != "own":
            activation = activation_called(task.choices.activations[name.activation])
        model.load_state_dict(self._start)
        model.zero_grad()
        setting = Setting(self._sites, activation, self._mitigation, task.subject.samples)
        initialization = initialization_called(task.choices.initializations[name.initialization])
        torch.manual_seed(task.seed)

        def forward() -> Tensor:
            with self._swapped(setting):
                return task.subject.loss(model)

        done = initialize(model, initialization, self._gain_of(activation), draws, forward)
        if done.reason is not None:
            return Outcome(left_out={name: done.reason})
        torch.manual_seed(task.seed)
        at_rest = replace(setting, mitigation=replace(self._mitigation, dropout=0.0))
        if done.zeroed:
            self._one_step(setting)
        cell = measured(name, task.seed, model, task.subject.loss, at_rest)
        if task.train_steps:
            model.zero_grad()
            result = trained(
                model,
                lambda: self._backward(setting),
                task.train_steps,
                self._mitigation,
                seed=task.seed,
            )
            cell = replace(
                cell,
                trained=result.loss,
                learning_rate=result.learning_rate,
                early=result.early,
            )
        left = {} if initialization.name == "own" else dict(done.left)
        return Outcome([cell], left=left, notes=dict.fromkeys(done.notes))

    def _one_step(self, setting: Setting) -> None:
        """Behind zeros no gradient arrives before they have moved (notes of Goyal et al. 2017)."""
        self._backward(setting)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None and bool(parameter.grad.any()):
                    size = 1e-2 * (1 + float(parameter.norm())) / float(parameter.grad.norm())
                    parameter.sub_(size * parameter.grad)
        self.model.zero_grad()

    def _swapped(self, setting: Setting) -> AbstractContextManager[Swapped | None]:
        if setting.activation is None and not (setting.mitigation and setting.mitigation.at_sites):
            return nullcontext()
        return swapping(
            self.model, setting.sites, setting.activation, mitigation=setting.mitigation
        )

    def _backward(self, setting: Setting) -> float:
        """Checkpointed parts run again in the backward, so that it belongs to the swap, too."""
        with self._swapped(setting):
            loss = self._task.subject.loss(self.model)
            if bool(loss.isfinite()):
                loss.backward()
        return float(loss.detach())

    def _gain_of(self, activation: Activation | None) -> Activation:
        """Of its own activations the one that most sites have."""
        if activation is not None:
            return activation
        found = [site.activation for site in self._sites.hidden]
        known = [name for name in found if name is not None and name in ACTIVATIONS]
        return ACTIVATIONS[max(known, key=known.count)] if known else ACTIVATIONS["linear"]


def chunks(names: Sequence[Name], size: int) -> Iterator[tuple[Name, ...]]:
    """So many of one mitigation at a time."""
    ordered = sorted(range(len(names)), key=lambda i: names[i].mitigation)
    for first in range(0, len(ordered), size):
        yield tuple(names[i] for i in ordered[first : first + size])
