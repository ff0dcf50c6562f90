"""`gradscope.compare`: all configurations of a model, over seeds, here or on many workers."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture.arguments import check_model
from gradscope.capture.names import unwrapped
from gradscope.capture.trial import LossFunction
from gradscope.comparison import activation, initialization
from gradscope.comparison.activation import (
    ACTIVATIONS,
    Activation,
    ActivationFunction,
    activation_called,
)
from gradscope.comparison.cells import (
    Choices,
    ModelOrFactory,
    Outcome,
    Subject,
    Task,
    cells,
    chunks,
    merge,
)
from gradscope.comparison.initialization import CustomInitialization, initialization_called
from gradscope.comparison.measure import layer_names
from gradscope.comparison.mitigation import Change, mitigation_called
from gradscope.comparison.prediction import Chain, predicted
from gradscope.comparison.ranking import agreement, ranked
from gradscope.comparison.result import (
    Comparison,
    Configuration,
    Name,
    Verification,
)
from gradscope.comparison.sites import Sites, look_for_sites, refuse_none
from gradscope.comparison.store import Store
from gradscope.comparison.workers import here, there
from gradscope.errors import ConfigError, ConfigTypeError

Progress = Callable[[int, int], None]

# A worker's share: long enough to be worth sending the model.
_CHUNK = 24
_VERIFY_STEPS = 10


def compare(
    model_or_factory: ModelOrFactory,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    initializations: Sequence[str | CustomInitialization] | None = None,
    activations: Sequence[str | ActivationFunction] | None = None,
    mitigations: Sequence[str | Change] | None = None,
    seeds: int | Sequence[int] = 5,
    train_steps: int = 0,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    executor: Executor | None = None,
    log_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Which initialization and activation let the gradient reach the first layer of a model.

    Each configuration is put on a copy of the model, and one forward and backward of the batch is
    measured, per seed; seeds are shared, so that differences are paired. Nothing of the model, its
    gradients, the batch, or the random numbers changes by one bit. In train mode, dropout at 0.

    model_or_factory: a model, or a function that makes one: then each seed has its own.
    batch, loss_fn, forward: as for `gradscope.preflight`: a tuple is (inputs…, target) for
        `loss_fn(model(*inputs), target)`, a mapping `model(**batch)`; without loss_fn the
        output's `.loss` counts; else `forward(model, batch)` returns the loss.
    initializations, activations, mitigations: names, or functions: of a model copy, of a tensor,
        of a model copy. "own" is what the model has.
    seeds: how many, or which. train_steps: so many steps on the batch, at four learning rates.
    executor: any concurrent.futures.Executor; what it runs must be picklable. A worker that dies
        costs its own cells, which are tried once more, alone, and else reported as missing.
    log_dir: where cells are kept as they come; the same comparison goes on there, and TensorBoard
        finds the configurations as hparams.
    progress: told how many of how many cells there are.

    Raises ConfigError or ConfigTypeError before the grid starts. An interruption (Ctrl-C) returns
    what there is, `complete` says so.
    """
    started = time.monotonic()
    subject = _subject(model_or_factory, batch, loss_fn, forward)
    every = _seeds(seeds)
    if not isinstance(train_steps, int) or train_steps < 0:
        message = f"train_steps={train_steps!r} must be a number of steps, 0 or more"
        raise ConfigError(message)
    if isinstance(executor, ThreadPoolExecutor):
        message = (
            "executor: the threads of a ThreadPoolExecutor share torch's random numbers; give a "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))"
        )
        raise ConfigError(message)
    look = _look(subject, every[0])
    choices = _choices(initializations, activations, mitigations, look.sites)
    tasks = [
        Task(subject, choices, part, seed, train_steps, torch.get_num_threads())
        for seed in every
        for part in chunks(choices.names(), _CHUNK if executor else len(choices.names()))
    ]
    store = Store(log_dir, tasks, look.layers)
    outcome = Outcome(store.known(tasks))
    total = sum(len(task.names) for task in tasks)
    left = [task for task in map(store.without_known, tasks) if task.names]
    results = here(left) if executor is None else there(left, executor)
    try:
        for part in results:
            merge(outcome, part)
            store.add(part.cells)
            if progress is not None:
                progress(len(outcome.cells) + len(outcome.left_out) * len(every), total)
    except KeyboardInterrupt:
        if not outcome.cells:
            raise
    if not outcome.cells:
        message = "nothing could be compared: " + "; ".join(
            f"{name}: {why}" for name, why in outcome.left_out.items()
        )
        raise ConfigError(message)
    comparison = _put_together(subject, choices, look, outcome, every)
    missing = total - len(outcome.cells) - len(outcome.left_out) * len(every)
    comparison = replace(comparison, missing=max(missing, 0))
    if comparison.complete:
        comparison = replace(
            comparison, verification=_verified(comparison, subject, choices, every, train_steps)
        )
    if log_dir is not None:
        from gradscope.comparison.tensorboard import write_hparams  # noqa: PLC0415

        write_hparams(comparison, Path(log_dir))
    return replace(comparison, seconds=time.monotonic() - started)


def _subject(
    model: ModelOrFactory,
    batch: Any,
    loss_fn: LossFunction | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Subject:
    if isinstance(model, nn.Module):
        check_model(model)
        return Subject(unwrapped(model), batch, loss_fn, forward)
    if not callable(model):
        message = f"model_or_factory={model!r} is neither a model nor a function that makes one"
        raise ConfigTypeError(message)
    return Subject(model, batch, loss_fn, forward)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    every = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not every or len(set(every)) < len(every) or any(seed < 0 for seed in every):
        message = f"seeds={seeds!r} must be a number above 0, or different numbers of 0 or more"
        raise ConfigError(message)
    return every


class _Look:
    """What one forward and backward on a copy tells of the model."""

    def __init__(self, subject: Subject, seed: int) -> None:
        model = subject.made(seed)
        self.title = type(model).__name__
        self.sites = look_for_sites(model, lambda: subject.loss(model))
        found = {site.activation for site in self.sites.hidden} or {"linear"}
        name = found.pop() if len(found) == 1 else None
        self.own: Activation | None = ACTIVATIONS.get(name) if name else None
        self.layers, plain = layer_names(model, subject.loss)
        self.chain = Chain.of(model, plain=plain)
        subject.loss(model).backward()


def _look(subject: Subject, seed: int) -> _Look:
    try:
        with subject.unmoved():
            return _Look(subject, seed)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = (
            "the model is too large for the copy that compare works on; give a smaller one of "
            "the same form"
        )
        raise ConfigError(message) from error


def _choices(
    initializations: Sequence[str | CustomInitialization] | None,
    activations: Sequence[str | ActivationFunction] | None,
    mitigations: Sequence[str | Change] | None,
    sites: Sites,
) -> Choices:
    if activations is None:
        activations = activation.COMPARED if sites.hidden else ("own",)
    made = Choices(
        _named(
            "initializations",
            initialization.COMPARED if initializations is None else initializations,
            lambda wanted: initialization_called(wanted).name,
        ),
        _named(
            "activations",
            activations,
            lambda wanted: "own" if wanted == "own" else activation_called(wanted).name,
        ),
        _named("mitigations", mitigations or ("none",), lambda w: mitigation_called(w).name),
    )
    if made.activations.keys() - {"own"}:
        refuse_none(sites)
    return made


def _named(
    argument: str, wanted: Iterable[Any], name_of: Callable[[Any], str]
) -> Mapping[str, Any]:
    if isinstance(wanted, str) or callable(wanted):
        message = f"{argument}={wanted!r} must be a list of names or functions: [{wanted!r}]"
        raise ConfigTypeError(message)
    made: dict[str, Any] = {}
    for one in wanted:
        name = name_of(one)
        if name in made and made[name] != one:
            message = f"{argument}: two are called {name!r}; give the functions different names"
            raise ConfigError(message)
        made[name] = one
    if not made:
        message = f"{argument}=[] leaves nothing to compare; leave it out for the usual ones"
        raise ConfigError(message)
    return made


def _put_together(
    subject: Subject, choices: Choices, look: _Look, outcome: Outcome, seeds: tuple[int, ...]
) -> Comparison:
    known = {
        name: activation_called(wanted)
        for name, wanted in choices.activations.items()
        if name != "own"
    }
    fallback = look.own or ACTIVATIONS["linear"]
    snippets = {
        name: initialization_called(choices.initializations[name.initialization]).snippet(
            known.get(name.activation, fallback)
        )
        for name in {cell.name for cell in outcome.cells}
    }
    theory = predicted(look.chain, look.own, known)
    configurations = ranked(outcome.cells, snippets, theory)
    notes = [*outcome.notes]
    if isinstance(subject.model, nn.Module) and "own" in choices.initializations:
        notes.append(
            "the own initialization is one draw, the model's: give a function that makes the "
            "model for an interval of it"
        )
    return Comparison(
        model=look.title,
        configurations=configurations,
        layers=look.layers,
        seeds=seeds,
        left_out=outcome.left_out,
        left={**look.sites.left, **outcome.left},
        notes=tuple(notes),
        agreement=agreement(configurations),
    )


def _verified(
    comparison: Comparison,
    subject: Subject,
    choices: Choices,
    seeds: tuple[int, ...],
    train_steps: int,
) -> Verification | None:
    """A short training of the best beside the model's own, before anyone is told to take it."""
    best = comparison.best
    if best.failure is not None or best.name == Name("own"):
        return None
    if train_steps and comparison.own is not None:
        return _verdict(best, comparison.own, train_steps)
    both = Choices(
        {**choices.initializations, "own": "own"},
        {**choices.activations, "own": "own"},
        {**choices.mitigations, "none": "none"},
    )
    steps = train_steps or _VERIFY_STEPS
    names = (best.name, Name("own"))
    task = Task(subject, both, names, seeds[0], steps, torch.get_num_threads())
    made = {cell.name: cell for part in cells(task) for cell in part.cells}
    if len(made) < len(names):
        return None
    of_best, of_own = (made[name].trained for name in names)
    return Verification(steps, 1, of_best, of_own, better=of_best < of_own)


def _verdict(best: Configuration, own: Configuration, steps: int) -> Verification:
    of_best, of_own = best.mean("trained"), own.mean("trained")
    better = of_best < of_own and not math.isnan(of_own)
    return Verification(steps, len(best.cells), of_best, of_own, better=better)
