"""What watch() is given, checked before training begins."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradscope.analysis.words import listed
from gradscope.capture.config import CaptureConfig
from gradscope.capture.entities import ROOT
from gradscope.capture.names import named_modules, owned_parameters
from gradscope.capture.selection import names_near
from gradscope.errors import ConfigError, ConfigTypeError


def check_cadence(*, every: object, budget: object) -> None:
    """One way to say how often is enough."""
    if every is not None and budget is not None:
        message = f"every={every!r} and budget={budget!r} contradict each other; give one of them"
        raise ConfigError(message)


def check_resume(*, resume: object, log_dir: object) -> None:
    """A run is resumed in the folder where it is."""
    if not isinstance(resume, bool):
        message = f"resume={resume!r} must be True or False; log_dir names the run"
        raise ConfigTypeError(message)
    if resume and log_dir is None:
        message = "resume=True needs log_dir, the folder of the run that is to go on"
        raise ConfigError(message)


def check_model(model: nn.Module) -> None:
    """The model is a module with something to train."""
    if not isinstance(model, nn.Module):
        message = f"model={type(model).__name__} is not an nn.Module"
        raise ConfigTypeError(message)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        message = (
            f"{type(model).__name__} has no trainable parameters: nothing can have a gradient; "
            "set requires_grad=True on what is to be trained"
        )
        raise ConfigError(message)


def checked_optimizers(
    model: nn.Module, given: Optimizer | Sequence[Optimizer] | None
) -> list[Optimizer] | None:
    """The optimizers that were named, each of which trains the model; None: none was named."""
    if given is None:
        return None
    optimizers = [given] if isinstance(given, Optimizer) else list(_each(given))
    if not optimizers:
        message = "optimizer=[] names none; leave it out to watch every optimizer of the model"
        raise ConfigError(message)
    mine = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            message = f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer"
            raise ConfigTypeError(message)
    # A wrapper and what it wraps are one.
    optimizers = list(dict.fromkeys(map(_that_steps, optimizers)))
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(parameter) in mine for parameter in held):
            message = (
                f"the {type(optimizer).__name__} holds none of the {type(model).__name__}'s "
                "parameters; build it from model.parameters() after the model is complete"
            )
            raise ConfigError(message)
    return optimizers


def _that_steps(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers that torch did not build, as accelerate's: it has the hooks.

    A wrapper with hooks of its own steps by itself, whatever it holds.
    """
    while True:
        inner, hooks = getattr(optimizer, "optimizer", None), _hooks_of(optimizer)
        if not isinstance(inner, Optimizer) or hooks not in (None, _hooks_of(inner)):
            break
        optimizer = inner
    if hooks is None:
        message = (
            f"optimizer={type(optimizer).__name__} is an Optimizer that torch did not build: it "
            "has no hooks; give watch() the optimizer that it steps, or none"
        )
        raise ConfigTypeError(message)
    return optimizer


def _hooks_of(optimizer: Optimizer) -> int | None:
    # Lightning's wrapper shares the hooks of what it wraps.
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return None if hooks is None else id(hooks)


def _each(given: Any) -> Iterator[Optimizer]:
    try:
        yield from given
    except TypeError:
        message = f"optimizer={type(given).__name__} is neither an optimizer nor a sequence of them"
        raise ConfigTypeError(message) from None


def check_selection(model: nn.Module, config: CaptureConfig) -> None:
    """Each pattern of include matches something, and something is left to be watched."""
    names = [name for name, _, _ in owned_parameters(model)]
    names += [name or ROOT for name, _ in named_modules(model)]
    for pattern in config.include:
        # Which functions the forward calls (layers.3/relu#0) is seen when it runs.
        if "/" not in pattern and not any(fnmatchcase(name, pattern) for name in names):
            message = (
                f"include={pattern!r} matches no parameter and no module of the "
                f"{type(model).__name__}; {names_near(pattern, names)}"
            )
            raise ConfigError(message)
    calls = any("/" in pattern for pattern in config.include)
    if not calls and not any(map(config.selects, names)):
        given = f"exclude={listed([repr(pattern) for pattern in config.exclude])}"
        if config.include:
            given = f"include={listed([repr(pattern) for pattern in config.include])} and {given}"
        message = (
            f"{given}: no parameter and no module of the {type(model).__name__} is left to be "
            f"watched; there are: {listed(names)}"
        )
        raise ConfigError(message)


def checked_scaler(scaler: object) -> GradScaler | None:
    """The scaler is torch's, or there is none."""
    if scaler is None or isinstance(scaler, GradScaler):
        return scaler
    message = (
        f"scaler={scaler!r} is not a torch.amp.GradScaler; without one parameter gradients are "
        "unscaled, output gradients are not"
    )
    raise ConfigTypeError(message)


def check_criterion(criterion: object) -> None:
    """The criterion is a module, or there is none."""
    if criterion is not None and not isinstance(criterion, nn.Module):
        message = (
            f"criterion={criterion!r} is not an nn.Module; of a plain function log the result: "
            "scope.log(loss=loss)"
        )
        raise ConfigTypeError(message)
