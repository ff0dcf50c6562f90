"""What is seen of the loss, and of signals: inputs, outputs and targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.config import CaptureConfig
from gradscope.capture.entities import Roster
from gradscope.capture.graph import GraphTaker
from gradscope.capture.guard import GRAPH, SIGNALS, Guard
from gradscope.capture.outputs import first_input, first_tensor, is_measurable, output_loss
from gradscope.capture.precision import widened
from gradscope.capture.pulses import Pulses
from gradscope.capture.shards import known, local
from gradscope.capture.spread import fingerprint, is_same, spread
from gradscope.capture.step import Step

_Source = Literal["criterion", "model", "log"]
# Who may tell of a signal: what one of these says stands in place of what an earlier one did.
_SOURCES: tuple[_Source, ...] = ("criterion", "model", "log")

# Faults of the data show in the first recorded steps. Later ones show drift alone, and how a signal
# spreads costs more than all else that is recorded of it: once in so many recorded steps it may.
_SPREAD_STEPS = 10
_SPREAD_EVERY = 10


class Signals:
    """Takes the loss into the pulse, and the statistics of signals into the open step's rows.

    write: told of the autograd graph, as `GraphTaker` has it.
    """

    def __init__(
        self,
        roster: Roster,
        config: CaptureConfig,
        pulses: Pulses,
        guard: Guard,
        write: Callable[[Mapping[str, Any]], None],
        *,
        writes: bool,
    ) -> None:
        self._roster = roster
        self._is_full = config.is_full
        self._pulses = pulses
        self._guard = guard
        self.graph = GraphTaker(roster, write)
        self._writes = writes
        # The recorded step that is open or was last, and how many there were with it.
        self._step, self._steps = -1, 0
        # Of its signals: the best source so far, and a few entries; those of the step before.
        self._ranks: dict[str, int] = {}
        self._samples: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}

    def _enter(self, step: Step) -> None:
        """A recorded step is told of: the first time in it, what the last one left is moved on."""
        if step.number != self._step:
            follows = step.number == self._step + 1
            self._earlier = self._samples if follows else {}
            self._samples, self._ranks = {}, {}
            self._step, self._steps = step.number, self._steps + 1

    def see_input(self, step: Step, given: object) -> None:
        """The model is given this."""
        if step.rows is not None and step.reader is None:
            found = first_input(given) if self._is_full else first_tensor(given)
            self._see(step, "input", found, "model")

    def see_output(self, step: Step, kwargs: Mapping[str, Any], output: Any) -> None:
        """The model returned this, with a loss in it or not."""
        if (loss := output_loss(output)) is not None:
            # transformers' models divide by this, the words of all the step's micro-batches.
            is_part = kwargs.get("num_items_in_batch") is not None
            number = widened(loss.detach())
            self._pulses.loss(number, "output", is_part=is_part)
        if step.rows is None or step.reader is not None or not self._writes:
            return
        tensor = first_tensor(output)
        self._guard.run(GRAPH, self.graph.see_output, step.number, tensor, loss)
        if self._is_full:
            self._see(step, "output", tensor, "model")

    def see_criterion(
        self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Any
    ) -> None:
        """The criterion was given these, and returned the loss."""
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return
        if (value := known(loss)) is not None:
            self._pulses.loss(widened(value.detach()).mean(), "criterion")
        self._see_loss(step, step.number, loss)
        for index, (name, keyword) in enumerate((("output", "input"), ("target", "target"))):
            signal = args[index] if len(args) > index else kwargs.get(keyword)
            self._see(step, name, _plain(signal), "criterion")

    def see_logged(
        self, step: Step | None, last: int, loss: object, target: object, output: object
    ) -> None:
        """The user tells of these, in the open step or after the last one has closed."""
        if isinstance(loss, Tensor):
            self._see_loss(step, last, loss)
        if step is not None:
            self._see(step, "target", _plain(target), "log")
            self._see(step, "output", _plain(output), "log")

    def _see_loss(self, step: Step | None, number: int, loss: Tensor) -> None:
        if self._writes and (step is None or step.rows is not None):
            self._guard.run(GRAPH, self.graph.see_loss, number, loss)

    def step_closed(self) -> None:
        """What was to be told of a recorded step has been."""
        self._guard.run(GRAPH, self.graph.step_closed)

    def _see(self, step: Step, name: str, tensor: Tensor | None, source: _Source) -> None:
        if tensor is None or step.rows is None or not self._writes:
            return
        self._enter(step)
        row = self._roster.signal(name, tensor)
        rank = _SOURCES.index(source)
        best = self._ranks.get(name, rank)
        if rank < best:
            return
        if rank > best:
            step.rows.drop(("signal", "signal_spread", "signal_repeated"), {row})
            self._samples.pop(name, None)
        self._ranks[name] = rank
        with torch.no_grad():
            step.rows.add("signal", row, statistics.moments(tensor))
            if self._is_full:
                self._guard.run(SIGNALS, self._look_closer, step, name, row, tensor)

    def _look_closer(self, step: Step, name: str, row: int, tensor: Tensor) -> None:
        rows, tensor = step.rows, local(tensor)
        is_first = name not in self._samples
        wants_spread = self._steps <= _SPREAD_STEPS or self._steps % _SPREAD_EVERY == 0
        # Of a sparse tensor most entries are not there.
        if rows is None or tensor.is_sparse or not tensor.numel():
            return
        if not (is_first or wants_spread):
            return
        sample = fingerprint(tensor)
        if wants_spread:
            rows.add("signal_spread", row, spread(tensor, sample))
        # Of several micro-batches the first ones are compared.
        if is_first:
            self._samples[name] = sample
            if (earlier := self._earlier.get(name)) is not None:
                rows.add("signal_repeated", row, is_same(sample, earlier))


def _plain(value: object) -> Tensor | None:
    """A signal: of a structured value the first tensor counts."""
    plain = isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point()
    tensor = value if plain else first_tensor(value)
    return tensor if isinstance(tensor, Tensor) and is_measurable(tensor) else None
