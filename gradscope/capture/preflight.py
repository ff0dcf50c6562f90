"""A look at a model before it is trained: some forwards and backwards on a copy."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.config import configured_rules
from gradscope.analysis.report import Report
from gradscope.capture.arguments import check_model, checked_optimizers
from gradscope.capture.names import unwrapped
from gradscope.capture.outputs import output_loss
from gradscope.capture.scope import watch
from gradscope.errors import ConfigError
from gradscope.record import Run, Table

LossFunction = Callable[..., Tensor]

# What was seen once may be chance, as dropout is; most rules ask for three steps. Those that ask
# for more want to see what the first updates make of it, as of a branch that begins at zero.
_PASSES = 3
# Rules on what steps do: before training there are none.
_ON_STEPS = ("GS005", "GS006", "GS007", "GS010", "GS2", "GS4")


def preflight(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Report:
    """What can be said of a model before it is trained, from three forwards and backwards.

    They run on a copy of the model, in the mode in which it is: of the model, its gradients, the
    optimizer, the batch and the random numbers nothing changes by one bit. No step is taken. Takes
    the memory of another model and its gradients. Forward hooks of your own are copied with the
    model, and run.

    batch: a tuple or list (inputs…, target) for `loss_fn(model(*inputs), target)`; a mapping for
        `model(**batch)`; on the model's device. Without loss_fn the output has the loss, as
        transformers' does: `.loss`, `["loss"]`, or itself; then all of a tuple are inputs. Dead
        units are told from quiet ones by 256 samples or more.
    loss_fn: a function or module that returns one number; of a mapping `loss_fn(output, batch)`.
    optimizer: the optimizer or optimizers that will train the model, which are asked for the
        parameters that they hold.
    forward: in place of all that `forward(model, batch)`, which returns the loss: mixed precision,
        several calls, losses that are added. Use the model that it is given.

    The rules are those that the project asks for; those on what steps do are left out. Raises
    ConfigError for a model that can't be copied, a batch of another kind, or a loss that is not
    one number with a gradient; what model, loss_fn or forward raise is raised, with a note.
    """
    check_model(model)
    optimizers = checked_optimizers(model, optimizer)
    core = unwrapped(model)
    with ExitStack() as afterwards:
        afterwards.enter_context(_same_random_numbers(core))
        afterwards.enter_context(_same_gradients(core))
        afterwards.enter_context(torch.enable_grad())
        made = _copied(core)
        lossy = _copied(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        run = _record(made, _AtRest.of(optimizers, core, made), _cloned(batch), lossy, forward)
    rules = [rule for rule in configured_rules() if not rule.code.startswith(_ON_STEPS)]
    return analyze(run, rules)


def _record(
    model: nn.Module,
    optimizers: Sequence[Optimizer] | None,
    batch: Any,
    loss_fn: LossFunction | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Run:
    criterion = loss_fn if isinstance(loss_fn, nn.Module) and forward is None else None
    with watch(model, optimizers, criterion, every=1) as scope:
        for _ in range(_PASSES):
            model.zero_grad()
            with _noted(batch):
                # A model may change its input in place.
                given = _cloned(batch)
                if forward is not None:
                    loss = forward(model, given)
                else:
                    output, target, loss = _applied(model, given, loss_fn)
                    if criterion is None:
                        scope.log(output=output, target=target)
                loss = _checked(loss)
                if criterion is None:
                    scope.log(loss=loss)
                loss.backward()
            for optimizer in optimizers or ():
                optimizer.step()
            if optimizers is None:
                scope.step()
    return _without_steps(scope.run())


def _applied(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> tuple[Any, Any, Any]:
    """The output, the target if it is known, and the loss."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        return output, None, _own(output) if loss_fn is None else loss_fn(output, batch)
    if loss_fn is None:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        return output, None, _own(output)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:  # noqa: PLR2004
        message = (
            f"batch={_in_words(batch)} must be (inputs…, target) or a mapping where there is a "
            "loss_fn; else give forward=lambda model, batch: …, which returns the loss"
        )
        raise ConfigError(message)
    output = model(*batch[:-1])
    target = batch[-1]
    return output, target if isinstance(target, Tensor) else None, loss_fn(output, target)


def _own(output: Any) -> Tensor:
    loss = output_loss(output)
    if loss is None:
        message = (
            f"the model returned {_in_words(output)} without a loss in it; give loss_fn, or "
            "forward=lambda model, batch: …, which returns the loss"
        )
        raise ConfigError(message)
    return loss


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        message = f"the loss is {_in_words(loss)}, not a tensor: nothing has a gradient"
        raise ConfigError(message)
    if loss.numel() != 1:
        message = (
            f"the loss has shape {tuple(loss.shape)}, and must be one number: return loss.mean(), "
            "or leave out reduction='none'"
        )
        raise ConfigError(message)
    if not loss.requires_grad:
        message = (
            "the loss has no gradient, it depends on no trainable parameter of the model: look for "
            ".detach(), .item(), .numpy() or torch.no_grad()"
        )
        raise ConfigError(message)
    return loss


class _AtRest(Optimizer):
    """Holds of a model's copy what another optimizer holds of the model; its step does nothing."""

    def __init__(self, like: Optimizer, copies: Mapping[int, nn.Parameter]) -> None:
        groups = [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [copies[id(p)] for p in group["params"] if id(p) in copies],
            }
            for group in like.param_groups
        ]
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing, between torch's hooks."""

    @staticmethod
    def of(
        optimizers: Sequence[Optimizer] | None, model: nn.Module, made: nn.Module
    ) -> list[Optimizer] | None:
        """One for each, under its name."""
        if optimizers is None:
            return None
        pairs = zip(model.parameters(), made.parameters(), strict=True)
        copies = {id(parameter): copied for parameter, copied in pairs}
        return [type(type(like).__name__, (_AtRest,), {})(like, copies) for like in optimizers]


# What leaves no trace.


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """What is drawn meanwhile is drawn again afterwards."""
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    kinds = sorted({device.type for device in devices} - {"cpu", "meta"})
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as forked:
        forked.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            places = [device for device in devices if device.type == kind]
            forked.enter_context(torch.random.fork_rng(devices=places, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def _same_gradients(model: nn.Module) -> Iterator[None]:
    """A loss function may reach the model itself: what arrives there is dropped."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _copied(module: nn.Module) -> nn.Module:
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        message = (
            f"the {type(module).__name__} can't be copied ({type(error).__name__}: {error}); call "
            "preflight before its first forward, or watch a few steps of training instead"
        )
        raise ConfigError(message) from error
    made.zero_grad()
    return made


def _cloned(value: Any) -> Any:
    """The batch, in tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: _cloned(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_cloned, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_cloned, value))
    return value


def _without_steps(run: Run) -> Run:
    """The run without what it can't know: the weights rest, and every batch is the same."""
    return replace(
        run,
        parameters=_masked(run.parameters, ("update_", "grad_previous_cosine", "epsilon_share")),
        signals=_masked(run.signals, ("repeated",)),
        meta={**run.meta, "log_dir": None, "preflight": True},
    )


def _masked(table: Table, beginnings: tuple[str, ...]) -> Table:
    values = table.values.copy()
    values[[name.startswith(beginnings) for name in table.quantities]] = np.nan
    return replace(table, values=values)


@contextmanager
def _noted(batch: Any) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        error.add_note(f"raised in gradscope.preflight, with batch={_in_words(batch)}")
        raise


def _in_words(value: Any) -> str:
    """What it is, and the shapes of what it holds."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_in_words(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_in_words, value)) + ")"
    return type(value).__name__
