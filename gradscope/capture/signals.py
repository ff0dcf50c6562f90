"""What is seen of the loss, and of signals: inputs, outputs and targets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.entities import Roster
from gradscope.capture.outputs import first_tensor, is_measurable, output_loss
from gradscope.capture.precision import widened
from gradscope.capture.pulses import Pulses
from gradscope.capture.shards import known
from gradscope.capture.step import Step


class Signals:
    """Takes the loss into the pulse, and the statistics of signals into the open step's rows."""

    def __init__(self, roster: Roster, pulses: Pulses, *, writes: bool) -> None:
        self._roster = roster
        self._pulses = pulses
        self._writes = writes

    def see_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """The model returned this, with a loss in it or not."""
        if (loss := output_loss(output)) is not None:
            # transformers' models divide by this, the words of all the step's micro-batches.
            is_part = kwargs.get("num_items_in_batch") is not None
            number = widened(loss.detach())
            self._pulses.loss(number, "output", is_part=is_part)

    def see_criterion(
        self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Any
    ) -> None:
        """The criterion was given these, and returned the loss."""
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return
        if (value := known(loss)) is not None:
            self._pulses.loss(widened(value.detach()).mean(), "criterion")
        for index, (name, keyword) in enumerate((("output", "input"), ("target", "target"))):
            signal = args[index] if len(args) > index else kwargs.get(keyword)
            if signal is not None:
                self.see(step, name, signal)

    def see(self, step: Step, name: str, value: object) -> None:
        """A signal: of a structured value the first tensor counts."""
        if step.rows is None or not self._writes:
            return
        plain = isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point()
        tensor = value if plain else first_tensor(value)
        if isinstance(tensor, Tensor) and is_measurable(tensor):
            with torch.no_grad():
                row = self._roster.signal(name, tensor)
                step.rows.add("signal", row, statistics.moments(tensor))
