"""The pulse: the numbers of every step, gathered until they are handed over."""

import math
from typing import Any

import torch
from torch import Tensor

from gradscope.analysis.words import listed
from gradscope.capture.guard import SCALARS, Guard
from gradscope.capture.precision import widened
from gradscope.capture.pulse import Pulse
from gradscope.capture.scaling import beside
from gradscope.capture.shards import known
from gradscope.log.scalars import MAX_USER_TAGS, is_users_own

# Names that mean something of gradscope's own in the log.
_RESERVED = frozenset(
    {
        "step",
        "nonfinite",
        "loss_nonfinite",
        "grad_norm",
        "grad_norm_before_clip",
        "grad_norm_after_clip",
        "clipped",
        "skipped",
    }
)

# By then every loop has logged its loss once: so many steps.
LOSS_EXPECTED_AFTER = 3

# Where a loss was seen; a later one of these outranks an earlier.
_LOSS_SOURCES = ("output", "criterion", "log")

# Pulses of unrecorded steps wait for the next record, but not more of them than this.
_MAX_PENDING = 256

# What would have to be gathered: at every step, for a number that training does not need.
_SPREAD = "{name} is spread over processes, and is not recorded"

# Of many names, so many are said.
_NAMED = 10


class Pulses:
    """The pulse of the open step, and those of closed steps that still wait."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._open: Pulse | None = None
        self._closed: Pulse | None = None
        # What was logged before the first step.
        self._early: Pulse | None = None
        self.pending: list[Pulse] = []
        self.loss_seen = False
        # The user's names that have a tag in TensorBoard, and whether there were too many.
        self.user_tags: set[str] = set()
        self._too_many = False

    def begin(self, step: int) -> None:
        """A step opens."""
        self._open, self._early = self._early or Pulse(step), None
        self._open.step = step

    def end(self) -> None:
        """The open step closes."""
        if self._open is not None:
            self.pending.append(self._open)
        self._closed, self._open = self._open, None

    def expect_loss(self) -> None:
        """Say what to do if none has been seen."""
        if not self.loss_seen:
            self._guard.say(
                "loss",
                f"no loss was seen in the first {LOSS_EXPECTED_AFTER} steps; add "
                "scope.log(loss=loss) to the loop, or give watch(criterion=...) the loss module: "
                "without it harm can't be judged",
            )

    @property
    def is_full(self) -> bool:
        """Whether no more should wait."""
        return len(self.pending) >= _MAX_PENDING

    def known(self) -> list[Pulse]:
        """Those that wait, and the open one."""
        return [*self.pending, self._open] if self._open is not None else self.pending

    def release(self) -> None:
        """Forget everything."""
        self._open = self._closed = self._early = None
        self.pending = []

    def current(self) -> Pulse:
        """Of the open step; of the closed one if no other has begun; else of the first to come."""
        if self._open is not None:
            return self._open
        if self._closed is None:
            self._early = self._early or Pulse(0)
            return self._early
        # It is written again, with what is new.
        if self._closed not in self.pending:
            self.pending.append(self._closed)
        return self._closed

    def log(self, loss: object, grad_norm: object, scalars: dict[str, object]) -> None:
        """What the user tells."""
        if loss is not None and (value := self._number("loss", loss)) is not None:
            self.loss(value, "log")
        pulse, left_out = self.current(), []
        for name, given in {"grad_norm_before_clip": grad_norm, **scalars}.items():
            if name in _RESERVED and name in scalars:
                message = f"log({name}=...) is a name of gradscope's own; log it under another"
                self._guard.say(SCALARS, message)
            elif given is not None and (value := self._number(name, given)) is not None:
                # The user knows better than the optimizer's first group.
                put = pulse.replace if name == "learning_rate" else pulse.add
                put(name, value)
                if is_users_own(name) and not self._has_tag(name):
                    left_out.append(name)
        if left_out and not self._too_many:
            self._too_many = True
            self._guard.say(
                SCALARS,
                f"TensorBoard shows the first {MAX_USER_TAGS} names given to log(), not "
                f"{listed(left_out, _NAMED)}, nor any further one; the run holds them all",
            )

    def _has_tag(self, name: str) -> bool:
        if len(self.user_tags) < MAX_USER_TAGS:
            self.user_tags.add(name)
        return name in self.user_tags

    def rate(self, rate: object) -> None:
        """The learning rate of the first optimizer that steps."""
        pulse = self.current()
        if "learning_rate" not in pulse.values:
            value = self._number("learning_rate", rate)
            pulse.add("learning_rate", math.nan if value is None else value)

    def clip(self, norm: Tensor, max_norm: float, scale: Tensor | None) -> None:
        """Gradients were clipped: the norm that torch found, as it was before their scaling."""
        if (found := known(norm.detach())) is None:
            self._guard.say(
                "clipping", _SPREAD.format(name="the norm before clipping"), aloud=False
            )
            return
        # As torch has it, in the norm's dtype; nothing that is not finite can be clipped.
        factor = float(max_norm) / (found.reshape(()) + 1e-6)
        clipped = (factor < 1) & torch.isfinite(found)
        before = widened(found.reshape(()))
        if scale is not None:
            before /= beside(scale, before)
        pulse = self.current()
        pulse.add("grad_norm_before_clip", before)
        pulse.add("grad_norm_after_clip", before * widened(factor.clamp(max=1.0)))
        pulse.add("clipped", widened(clipped))

    def loss(self, loss: Tensor | float, source: str, *, is_part: bool = False) -> None:
        """A loss, and where it was seen; parts add up to the step's, others are averaged."""
        pulse, rank = self.current(), _LOSS_SOURCES.index(source)
        if rank < pulse.loss_rank:
            return
        if rank > pulse.loss_rank:
            pulse.loss_rank = rank
            for name in ("loss", "loss_nonfinite"):
                pulse.drop(name)
        self.loss_seen = True
        earlier = pulse.values.get("loss")
        if is_part and earlier:
            pulse.replace("loss", earlier[0] + loss)
        else:
            pulse.add("loss", loss)
        if isinstance(loss, Tensor):
            pulse.add("loss_nonfinite", widened(~torch.isfinite(loss)))
        else:
            pulse.add("loss_nonfinite", float(not math.isfinite(loss)))

    def _number(self, name: str, value: object) -> Tensor | float | None:
        """A number, on the device if it is there; None with a note if it is none."""
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                if (here := known(value.detach())) is not None:
                    return widened(here.reshape(()))
                self._guard.say(SCALARS, _SPREAD.format(name=name), aloud=False)
                return None
            message = f"log({name}=...) got a tensor of shape {tuple(value.shape)}; it is dropped"
        else:
            try:
                number: Any = value
                return float(number)
            except Exception:  # noqa: BLE001  (whatever it is, it is no number)
                message = f"log({name}=...) got a {type(value).__name__}; it is dropped"
        self._guard.say(SCALARS, f"{message}: only numbers can be logged")
        return None
