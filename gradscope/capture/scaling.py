"""Loss scaling: what gradients are multiplied by, and the steps that a GradScaler skips.

The scale and the overflow stay on their device: nothing here makes the host wait for them.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from gradscope.capture import single_precision, statistics
from gradscope.capture.context import called_by_grad_scaler
from gradscope.capture.guard import Guard
from gradscope.capture.optimizers import Optimizers
from gradscope.capture.precision import widened
from gradscope.capture.pulse import Pulse


@dataclass(frozen=True, slots=True)
class Deferred:
    """What a GradScaler leaves to a fused optimizer; None: nothing of the kind.

    scale: what the gradients are still to be divided by.
    overflow: whether the optimizer leaves its parameters as they are: a bool on the device.
    """

    scale: Tensor | None = None
    overflow: Tensor | None = None


def beside(single: Tensor, tensor: Tensor) -> Tensor:
    """The single number on the tensor's device, as a scalar."""
    # The host would read it before it has arrived.
    to_host = tensor.device.type == "cpu"
    return single.to(tensor.device, non_blocking=not to_host).reshape(())


def unscaled(moments: Tensor, scale: Tensor) -> Tensor:
    """The moments of the tensor divided by the positive scale."""
    scale = beside(scale, moments).to(moments.dtype)
    if moments.dtype == torch.float32:
        return single_precision.divided(moments, scale)
    one = torch.ones_like(scale)
    return moments / torch.stack([one, scale, scale.square(), scale, scale, one, one])


def divided(tensor: Tensor, scale: Tensor) -> Tensor:
    """The tensor divided by the scale, in no less than single precision."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    return wide / beside(scale, wide)


def unless(skipped: Tensor, moments: Tensor) -> Tensor:
    """The moments; where the step was skipped those of no entry, but for the non-finite ones."""
    nothing = statistics.moments(moments[:0])
    nothing[-1] = moments[-1]
    return torch.where(beside(skipped, moments), nothing, moments)


class LossScaling:
    """What is known of the GradScaler that training uses, if one was given to watch()."""

    def __init__(self, scaler: GradScaler | None, optimizers: Optimizers, guard: Guard) -> None:
        # One that is switched off does nothing.
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers = optimizers
        self._guard = guard
        self._states: Mapping[int, Mapping[str, Any]] = {}
        self._asked_before: set[int] = set()
        # Whether the gradients of outputs are multiplied by a scale that is not known.
        self.is_unknown = False

    # Of the scaler's state only what makes the host wait has a public name.

    @property
    def scale(self) -> Tensor | None:
        """The scale as it is now; None before the first loss is scaled."""
        return None if self._scaler is None else self._scaler._scale  # noqa: SLF001

    def step_opens(self, pulse: Pulse) -> None:
        """Note the scale of the step."""
        if self._scaler is None:
            return
        # update() begins another dict: this one keeps what becomes of the step.
        self._states = self._scaler._per_optimizer_states  # noqa: SLF001
        self._asked_before = self._asked()
        initial: float = self._scaler._init_scale  # noqa: SLF001
        scale = self.scale
        pulse.add("loss_scale", initial if scale is None else widened(scale))

    def left_to(self, optimizer: Optimizer, pulse: Pulse) -> Deferred:
        """What the optimizer, whose step begins, has to do by itself; notes if it skips."""
        scale, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        # Of an optimizer without any gradient, `found_inf` is the number 0.
        if not isinstance(found, Tensor):
            return Deferred()
        # A new tensor: the scaler adds up its own.
        overflow = found.reshape(()) > 0
        pulse.add("skipped", widened(overflow))
        return Deferred(scale, overflow)

    def has_skipped(self, stepped: AbstractSet[int]) -> bool:
        """Whether it was asked for the step of an optimizer that is not among those stepped."""
        asked = self._asked() - self._asked_before
        if not asked:
            return False
        # Where none is known yet, none has ever stepped: it is any that was asked for.
        ours = self._optimizers.known() or asked
        return bool(asked & ours - stepped)

    def step_closes(self, pulse: Pulse, stepped: AbstractSet[int]) -> None:
        """Note whether the step was skipped; a fused optimizer's overflow is in the pulse."""
        if self._scaler is not None:
            pulse.add("skipped", float(self.has_skipped(stepped)))

    def _asked(self) -> set[int]:
        return {key for key, state in self._states.items() if state["stage"] is OptState.STEPPED}

    def unscaled(self, moments: Tensor) -> Tensor:
        """The moments of a gradient that arrives now, of the loss as it was before scaling."""
        scale = self.scale
        return moments if scale is None else unscaled(moments, scale)

    def clipping_scale(self) -> Tensor | None:
        """The scale where the user clips gradients that are still multiplied by it."""
        if self._scaler is None or self.scale is None:
            return None
        states = self._scaler._per_optimizer_states.values()  # noqa: SLF001
        if any(state["stage"] is OptState.UNSCALED for state in states):
            return None
        message = (
            "clip_grad_norm_ found gradients that are still multiplied by the GradScaler's scale; "
            "call scaler.unscale_(optimizer) before it"
        )
        self._guard.say("clipping", message)
        return self.scale

    def label(self) -> None:
        """Within a step: say that output gradients are scaled if the scale is not known."""
        if self.scale is None and called_by_grad_scaler():
            self.is_unknown = True
            message = (
                "output gradients are multiplied by the GradScaler's scale, parameters' are not; "
                "watch(scaler=...) unscales both"
            )
            self._guard.say("output gradients", message, aloud=False)

    def is_hidden(self, optimizer: Optimizer, arguments: Mapping[str, Any]) -> bool:
        """Whether the step unscales in a way of its own; says so."""
        # The way of optimizers from before torch 2.0, which some libraries still go.
        if "grad_scaler" not in arguments:
            return False
        message = (
            f"{type(optimizer).__name__}.step takes the GradScaler: its gradients may be scaled "
            "and its steps skipped, so they are not recorded; use an optimizer that leaves "
            "unscaling to the GradScaler"
        )
        self._guard.say("parameters", message)
        return True
