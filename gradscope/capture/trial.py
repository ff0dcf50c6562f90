"""One forward on a copy: the loss of a batch, and nothing changed by it."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.capture.outputs import output_loss
from gradscope.errors import ConfigError

LossFunction = Callable[..., Tensor]


def applied(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> tuple[Any, Any, Any]:
    """The output, the target if it is known, and the loss: see preflight."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        return output, None, _own(output) if loss_fn is None else loss_fn(output, batch)
    if loss_fn is None:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        return output, None, _own(output)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:  # noqa: PLR2004
        message = (
            f"batch={in_words(batch)} must be (inputs…, target) or a mapping where there is a "
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
            f"the model returned {in_words(output)} without a loss in it; give loss_fn, or "
            "forward=lambda model, batch: …, which returns the loss"
        )
        raise ConfigError(message)
    return loss


def checked(loss: Any) -> Tensor:
    """The loss, if it is one number with a gradient; else ConfigError."""
    if not isinstance(loss, Tensor):
        message = f"the loss is {in_words(loss)}, not a tensor: nothing has a gradient"
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


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
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
def same_gradients(model: nn.Module) -> Iterator[None]:
    """A loss function may reach the model itself: what arrives there is dropped."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def same_modes_and_buffers(model: nn.Module) -> Iterator[None]:
    """Training flags and buffers, as running statistics, are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, held in buffers:
                buffer.copy_(held)


def copied(module: nn.Module) -> nn.Module:
    """A copy without gradients, or ConfigError."""
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        message = (
            f"the {type(module).__name__} can't be copied ({type(error).__name__}: {error}); give "
            "it before its first forward, or watch a few steps of training instead"
        )
        raise ConfigError(message) from error
    made.zero_grad()
    return made


def cloned(value: Any) -> Any:
    """The batch, in tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: cloned(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cloned, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(cloned, value))
    return value


@contextmanager
def noted(function: str, batch: Any) -> Iterator[None]:
    """A note on what is raised: in which of our functions, with what batch."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        error.add_note(f"raised in gradscope.{function}, with batch={in_words(batch)}")
        raise


def in_words(value: Any) -> str:
    """What it is, and the shapes of what it holds."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {in_words(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(in_words, value)) + ")"
    return type(value).__name__
