"""A training, its unwatched twin, and a twin in which every module's output is copied.

What comes back to the copies is the gradient at the outputs, whatever happens to these later.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.reference import Numbers, described, prefixed
from tests.capture.test_modules import NOT_RECORDED, assert_modules
from tests.capture.test_transparency import bits, traces
from tests.capture.trainings import vectors
from tests.setups.received import Received, assert_describes, entries

STEPS = 3


@dataclass
class Subject:
    """A model, its optimizers, and what one step of its loop does."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    body: Callable[[int], object]
    # Looked at right after each step.
    kept: Callable[[], object] = lambda: None
    # Told of an optimizer that a step has built.
    built: Callable[[Optimizer], object] = lambda _: None


Build = Callable[[], Subject]


def trained(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    make: Callable[[nn.Module], Optimizer] = lambda model: SGD(model.parameters(), lr=0.1),
) -> Subject:
    """Forward, backward, step."""
    optimizer = make(model)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return Subject(model, [optimizer], body)


def classified(model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]] = vectors) -> Subject:
    def loss_of() -> Tensor:
        x, y = batch()
        return F.cross_entropy(model(x), y)

    return trained(model, loss_of)


def stepped(model: nn.Module, differentiate: Callable[[nn.Module], object]) -> Subject:
    """A loop whose gradients are made in another way than by one backward."""
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        del number
        optimizer.zero_grad()
        differentiate(model)
        optimizer.step()

    return Subject(model, [optimizer], body)


def loss_of(model: nn.Module) -> Tensor:
    x, y = vectors()
    return F.cross_entropy(model(x), y)


class Layers(nn.Module):
    """A first and a last layer, and between them what `forward` makes of them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        for name, part in parts.items():
            self.add_module(name, part)
        self.last = nn.Linear(8, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.between(self, self.first(x)))
        return out


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _built(build: Build) -> Subject:
    torch.manual_seed(0)
    return build()


def _run(subject: Subject, number: int) -> None:
    torch.manual_seed(100 + number)
    subject.body(number)


def outcome(subject: Subject) -> object:
    """All that a training has led to, random numbers included."""
    return bits(
        {
            "state": dict(subject.model.state_dict()),
            "gradients": [p.grad for p in subject.model.parameters()],
            "optimizers": [optimizer.state_dict() for optimizer in subject.optimizers],
            "random": torch.get_rng_state(),
            "kept": subject.kept(),
        }
    )


class Passing(torch.autograd.Function):
    """A copy; tells of the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arrive: Callable[[Tensor], None]) -> Tensor:
        ctx.arrive = arrive
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.arrive(gradients[0])
        return gradients[0], None


class Probes:
    """A copy is made of the first floating tensor with a dimension that each module returns."""

    def __init__(self, model: nn.Module, but: Sequence[str]) -> None:
        self._model, self._but = model, but
        # Those that returned something with gradients enabled.
        self.met: set[str] = set()
        self._uses: dict[str, int] = {}
        self._seen: dict[str, list[tuple[Tensor, list[Tensor]]]] = {}
        self._place()
        model.register_forward_pre_hook(lambda *_: self._begin())

    def _begin(self) -> None:
        if torch.is_grad_enabled():
            self._uses.clear()
            # Modules may have been replaced.
            self._place()

    def _place(self) -> None:
        named = dict(self._model.named_modules())
        for name in measured(self._model):
            module = named["" if name == "(root)" else name]
            if name not in self._but and "forward" not in vars(module):
                module.forward = partial(self._call, name, module.forward)

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        use = self._uses.get(name, 0)
        self._uses[name] = use + 1
        if not torch.is_grad_enabled():
            return result
        changed, done = _first_replaced(
            result, partial(self._probe, f"{name}#{use}" if use else name)
        )
        if done:
            self.met.add(name)
        return changed

    def _probe(self, name: str, output: Tensor) -> Tensor:
        gradients: list[Tensor] = []
        self._seen.setdefault(name, []).append((output.detach().clone(), gradients))
        if not output.requires_grad:
            return output

        def arrive(gradient: Tensor) -> None:
            # Of the gradient of a gradient the loss's share comes in the loss's backward.
            if not (torch.is_grad_enabled() and is_within_autograd_grad()):
                gradients.append(gradient.detach().clone())

        passed: Tensor = Passing.apply(output, arrive)  # type: ignore[no-untyped-call]
        return passed

    def take(self) -> dict[str, Numbers]:
        """Of the step that has ended: what was returned, and what arrived there."""
        found = {}
        for name, uses in self._seen.items():
            numbers = prefixed("output_", _described(output for output, _ in uses))
            arrived = [gradient for _, gradients in uses for gradient in gradients]
            if arrived:
                numbers |= prefixed("output_grad_", _described(arrived))
            found[name] = {q: value for q, value in numbers.items() if q not in NOT_RECORDED}
        self._seen = {}
        return found


def is_within_autograd_grad() -> bool:
    """Whether `torch.autograd.grad` is among the callers; backward has another entrance."""
    return any(frame.name == "grad" for frame in traceback.extract_stack())


def _described(tensors: Iterable[Tensor]) -> Numbers:
    return described(torch.from_numpy(entries(tensor)) for tensor in tensors)


def _first_replaced(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """The structure with the tensor changed that counts, and whether there is one."""
    if isinstance(value, Tensor):
        counts = value.dim() > 0 and (value.is_floating_point() or value.is_complex())
        return (change(value), True) if counts else (value, False)
    parts, put = _taken_apart(value)
    for place, part in parts.items():
        new, done = _first_replaced(part, change)
        if done:
            return put({**parts, place: new}), True
    return value, False


def _taken_apart(value: Any) -> tuple[dict[Any, Any], Callable[[dict[Any, Any]], Any]]:
    """The parts of a structure, and what makes it of such parts again."""
    if isinstance(value, Mapping):
        return dict(value), type(value)
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))
        return dict(enumerate(value)), lambda parts: make(parts.values())
    if is_dataclass(value) and not isinstance(value, type):
        named = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return named, lambda parts: replace(value, **parts)
    return {}, lambda _: value


def measured(model: nn.Module) -> list[str]:
    """Leaves, direct children of ModuleList and Sequential, and the root."""
    named = dict(model.named_modules())
    names = []
    for name, module in named.items():
        around = named[name.rpartition(".")[0]]
        if isinstance(around, nn.MultiheadAttention) and name:
            continue
        listed = isinstance(around, (nn.Sequential, nn.ModuleList))
        is_leaf = isinstance(module, nn.MultiheadAttention) or not list(module.children())
        if not name or (not isinstance(module, nn.ModuleList) and (is_leaf or listed)):
            names.append(name or "(root)")
    return names


def compared(
    build: Build,
    folder: Path,
    *,
    but: Sequence[str] = (),
    reference: Build | None = None,
    given: bool = True,
    problems: Sequence[str] = (),
    **options: Any,
) -> Run:
    """The run of a training, after comparing all that it holds with its twins'.

    but: modules without an output to compare. reference: the training to probe, where it is
    written otherwise. given: whether watch() is given the optimizers. problems: parts of what
    is to be said.
    """
    plain = _built(build)
    received = [Received(plain.model, optimizer) for optimizer in plain.optimizers[:1]]
    plain.built = lambda optimizer: received.append(Received(plain.model, optimizer))
    ends = []
    for number in range(STEPS):
        _run(plain, number)
        ends.append(outcome(plain))
    probed = _built(reference or build)
    probes = Probes(probed.model, but)
    expected = []
    for number in range(STEPS):
        _run(probed, number)
        expected.append(probes.take())
        assert probes.met >= {*measured(probed.model)} - {*but}

    left = traces(plain.model, [])
    subject = _built(build)
    optimizers = list(subject.optimizers) if given else None
    with watch(subject.model, optimizers, log_dir=folder, every=1, **options) as scope:
        for number in range(STEPS):
            _run(subject, number)
            assert outcome(subject) == ends[number], f"step {number} changed"
            scope.log(loss=0.0)
        run = scope.run()
    assert traces(subject.model, []) == left
    said = [problem["message"] for problem in run.meta["problems"]]
    assert len(said) == len(problems), said
    assert all(part in message for part, message in zip(problems, said, strict=True)), said
    assert list(run.recorded_steps) == list(range(STEPS))
    for row, numbers in enumerate(expected):
        assert_modules(run.modules, numbers, row)
    for row, step in enumerate(received[0].steps):
        assert step
        for name, gradient in step.items():
            assert_describes(run.parameters, "grad_", row, name, gradient)
    return run
