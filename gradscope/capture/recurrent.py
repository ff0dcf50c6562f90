"""The gradient along time of fused recurrent layers, by a backward of gradscope's own.

A hook on the output of `nn.RNN`, `nn.LSTM` or `nn.GRU` sees what the loss sends there directly:
nothing before the last step, where only that is read. What comes through time arises inside. So on
a few of the recorded steps the layer runs once more when the optimizer's step begins: its own
forward on detached inputs, with the random numbers of the first time, and a backward from the
gradients that arrived at its outputs to its input alone. No hook of the user's runs, no `.grad` is
touched, and where anything is not as it was for the first time, nothing is measured.

Until then what went in and out of the layer is kept, and the gradients that arrived; of several
micro-batches one after the other only the last. While it runs, it takes what its own forward and
backward take.

The arithmetic is the layer's, in its dtype: a gradient that has faded below that is 0, as it is
for training.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture import statistics
from gradscope.capture.config import CaptureConfig
from gradscope.capture.context import is_set_apart
from gradscope.capture.entities import Roster
from gradscope.capture.guard import TIME, Guard
from gradscope.capture.hooks import on_gradient
from gradscope.capture.recorder import Rows
from gradscope.capture.rerun import (
    KeptForward,
    by_time,
    draws,
    ends_and_middle,
    input_gradients,
    keep,
    outputs_of,
    unfit,
)
from gradscope.capture.scaling import LossScaling
from gradscope.capture.uses import add_time_steps


class TimeGradients:
    """Measures the gradient along time of the recurrent layers, on few of the recorded steps."""

    def __init__(
        self, roster: Roster, config: CaptureConfig, guard: Guard, scaling: LossScaling
    ) -> None:
        self._roster = roster
        self._config = config
        self._guard = guard
        self._scaling = scaling
        guard.on_disable[TIME] = self.release
        self._rows: Rows | None = None
        # Recorded steps until it is time again, counted from one where something was measured.
        self._wait = 0
        self._is_due = False
        self._pending: list[KeptForward] = []
        self._random: dict[nn.Module, Tensor] = {}
        # The rows that this step has.
        self._measured: set[int] = set()

    def arm(self, rows: Rows) -> None:
        """A recorded step begins: what is measured goes to `rows`."""
        self.finish()
        self._rows = rows
        self._is_due = self._wait <= 0 and not self._guard.is_disabled(TIME)
        self._wait -= 1

    def needs_start(self, module: nn.Module) -> bool:
        """Whether in this step the beginning of the module's forwards has to be seen."""
        return self._is_due and draws(module)

    def finish(self) -> None:
        """The step is over."""
        self.release()
        self._rows, self._is_due = None, False
        self._measured = set()

    def release(self) -> None:
        """Let go of what is kept: no gradient that matters is to come."""
        self._pending, self._random = [], {}

    def begins(self, module: nn.Module) -> None:
        """A forward of the module begins."""
        if self.needs_start(module):
            self._random[module] = torch.get_rng_state()

    def ends(self, row: int, module: nn.Module, given: tuple[Any, Any], returned: Any) -> None:
        """A forward of the module ends, in grad mode; `given` are its arguments."""
        if self._is_due and isinstance(module, nn.RNNBase):
            self._guard.run(TIME, self._keep, row, module, given, returned)

    def forward_begins(self) -> None:
        """The model's next forward: the backwards of the last one are over, if any was."""
        if self._pending:
            self._guard.run(TIME, self._settle, KeptForward.has_arrived)

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """These parameters are about to be updated: their gradients are complete.

        Within a backward those of others need not be.
        """
        if self._pending:
            updated = {id(parameter) for parameter in parameters}
            within = is_set_apart()

            def is_complete(forward: KeptForward) -> bool:
                held = (id(parameter) for parameter in forward.module.parameters())
                return forward.has_arrived() and not (within and updated.isdisjoint(held))

            self._guard.run(TIME, self._settle, is_complete)

    def arrive(self, forward: KeptForward | None, row: int, index: int, gradient: Tensor) -> None:
        """A gradient arrives at an output of a forward, which may be kept no more."""
        if forward is not None:
            self._guard.run(TIME, forward.take, index, gradient)
        elif row in self._measured:
            self._say(row, "without what arrived after an optimizer's step, or the next forward")

    def _keep(self, row: int, module: nn.RNNBase, given: tuple[Any, Any], returned: Any) -> None:
        args, kwargs = given
        random = self._random.pop(module, None)
        outputs = outputs_of(returned)
        awaited = [output.requires_grad and not output.is_leaf for output in outputs]
        if not any(awaited):
            return
        taken = args[0] if args else kwargs["input"]
        reason = unfit(module, taken, random)
        # Without a backward they would pile up.
        if sum(forward.row == row for forward in self._pending) >= self._config.max_uses:
            reason = f"of more than {self._config.max_uses} forwards before a backward, not of all"
        if reason is not None:
            self._say(row, reason)
            return
        hidden = args[1] if len(args) > 1 else kwargs.get("hx")
        forward = keep(module, row, taken, hidden, returned, random=random)
        self._pending.append(forward)
        for index, output in enumerate(outputs):
            if awaited[index]:
                on_gradient(output, _Arrival(self, forward, index))

    def _settle(self, is_complete: Callable[[KeptForward], bool]) -> None:
        complete = [forward for forward in self._pending if is_complete(forward)]
        self._pending = [forward for forward in self._pending if forward not in complete]
        for forward in complete:
            reason = forward.obstacle()
            if reason is not None:
                self._say(forward.row, reason)
            elif self._rows is not None:
                self._measure(self._rows, forward)
                self._measured.add(forward.row)
                self._wait = self._config.time_gradients_every - 1

    def _measure(self, rows: Rows, forward: KeptForward) -> None:
        for direction, gradient in enumerate(input_gradients(forward)):
            row, is_reverse = forward.row, direction > 0
            if is_reverse:
                name, shape = self._roster.module_name(row), forward.outputs[0].value.shape
                row = self._roster.companion(name, "reverse", forward.module, tuple(shape))
            pieces, is_packed = by_time(forward, gradient), forward.packed is not None
            steps = ends_and_middle(pieces, is_packed=is_packed, reverse=is_reverse)
            for what, tensor in (("time", gradient), *steps):
                rows.add(what, row, self._scaling.unscaled(statistics.moments(tensor)))
            add_time_steps(rows, row, len(pieces))

    def _say(self, row: int, reason: str) -> None:
        name = self._roster.module_name(row)
        self._guard.say(TIME, f"gradients along time of {name}: {reason}", aloud=False)


class _Arrival:
    """A tensor hook: keeps neither the output nor what is kept of the forward."""

    __slots__ = ("_forward", "_index", "_owner", "_row")

    def __init__(self, owner: TimeGradients, forward: KeptForward, index: int) -> None:
        self._owner, self._forward = owner, weakref.ref(forward)
        self._row, self._index = forward.row, index

    def __call__(self, gradient: Tensor) -> None:
        self._owner.arrive(self._forward(), self._row, self._index, gradient)
