"""The step: when it opens and closes, what is read in it, and where that goes."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradscope.capture.cadence import Cadence
from gradscope.capture.config import CaptureConfig
from gradscope.capture.context import is_replica, is_set_apart
from gradscope.capture.coverage import Account
from gradscope.capture.distributed import Presence, processes
from gradscope.capture.entities import Roster
from gradscope.capture.events import Events
from gradscope.capture.guard import OUTPUTS, SCALARS, STEPS, Guard
from gradscope.capture.handover import Handover
from gradscope.capture.merge import ShardMerge
from gradscope.capture.meter import Meter
from gradscope.capture.modules import ModuleTaps
from gradscope.capture.names import owned_parameters
from gradscope.capture.optimizers import Optimizers, with_closure
from gradscope.capture.parameters import ParameterReader
from gradscope.capture.probes import ParameterProbes
from gradscope.capture.pulses import LOSS_EXPECTED_AFTER, Pulses
from gradscope.capture.recorder import Recorder, Rows
from gradscope.capture.samples import CoordinateSamples
from gradscope.capture.scaling import Deferred, LossScaling
from gradscope.capture.selection import Selection
from gradscope.capture.signals import Signals
from gradscope.capture.step import Step
from gradscope.log.writer import Continuation


class Observer:
    """Follows one model's training: its handlers are called by hooks, and by the user's Scope.

    A step is what one `optimizer.step()` was given. It opens at the first forward or backward
    in grad mode after the last one closed, and closes at the next such forward after an
    optimizer stepped or was skipped, when the same one steps again, or when it is asked to.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CaptureConfig,
        guard: Guard,
        scaler: GradScaler | None,
        *,
        outputs: bool,
        writes: bool = True,
    ) -> None:
        self.model = model
        self._guard = guard
        # Of several processes one writes; the others take part where parameters are split.
        self._writes = writes
        self._roster = Roster(model, config)
        self._pulses = Pulses(guard)
        self.selection = Selection(self._roster, guard)
        self._handover = handover = Handover(self._roster, self.selection, self._pulses)
        meter = Meter(lambda: guard.seconds()[0] + handover.seconds())
        self._cadence = Cadence(config.every, config.budget, meter, handover.record_bytes)
        self._events = Events(self._cadence.alarm)
        presence = None if processes() is None else Presence(model)
        self.shards = ShardMerge(self._cadence, self._roster.watched_parameters, presence, guard)
        self.optimizers = Optimizers(model, self._roster.former, guard)
        self._scaling = scaling = LossScaling(scaler, self.optimizers, guard)
        self._taps = ModuleTaps(self._roster, config, guard, scaling) if outputs else None
        guard.on_disable[STEPS] = self._release
        self._samples = CoordinateSamples(config) if config.is_full else None
        self._probes = ParameterProbes() if config.is_full else None
        # Set by the owner: hooks the parts, when they are to be hooked; told how many steps are
        # recorded, when one more is.
        self.watch_parts: Callable[[], None] = lambda: None
        self.on_record: list[Callable[[int], None]] = []
        # Called where a step may begin, with what tells whether the last is over; whether to go on.
        self.between_steps: Callable[[Callable[[], bool]], bool] = lambda _: True
        self._on_end: Callable[[], None] = lambda: None
        self._watching_parts = False
        self._open: Step | None = None
        self._next = 0
        write = handover.graph
        self._signals = Signals(self._roster, config, self._pulses, guard, write, writes=writes)
        self._account = Account()
        self.counts = self._account.counts

    def record_to(self, recorder: Recorder) -> None:
        """Hand over what is recorded from now on."""
        self._handover.recorder = recorder
        recorder.on_pulses = WeakMethod(self._events.arrived)

    def take_up(self, earlier: Continuation) -> None:
        """Go on after the last step of a run; raises ConfigError if it is another model's."""
        self._roster.take_up(earlier.entities)
        self._next = earlier.step
        # Other processes do not know the step: the first one is recorded, the next are agreed.
        due = processes() is not None
        self._cadence.begin_at(earlier.step, due=due, written=earlier.size)
        self._account.earlier = earlier.coverage
        self._signals.graph.is_done = "graph" in earlier.meta

    def traced(self, why_not: str | None) -> None:
        """A compiler takes a hook into its graph; or leaves it out, and why."""
        if self._taps is not None:
            self._taps.traced(why_not)

    # Handlers for hooks: signatures are torch's.

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model's forward begins."""
        if self.shards.over:
            self._on_end()
        if is_set_apart():
            # A loop that has its gradients from there opens no step before.
            if self._taps is not None and (self._open is None or self._open.rows is not None):
                self._taps.note_transform()
            return
        if is_replica(module):
            message = "the model runs as replicas of itself: its outputs are not recorded"
            self._guard.say(OUTPUTS, message, aloud=False)
            return
        if torch.is_grad_enabled():
            if self.between_steps(self._is_between):
                self._guard.run(STEPS, self._forward_begins, module, args, kwargs)
        elif self._taps is not None:
            self._taps.stand_aside()

    def before_part(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A part of a model whose own forward is not called begins its forward."""
        del args, kwargs
        expected = torch.is_grad_enabled() and not is_set_apart() and not is_replica(module)
        if expected and self.between_steps(self._is_between):
            self._guard.run(STEPS, self._part_begins)

    def after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The model's forward ends."""
        del args
        if torch.is_grad_enabled() and not is_set_apart() and not is_replica(module):
            if self._taps is not None:
                self._taps.forward_ends()
            if self._open is not None:
                self._guard.run(SCALARS, self._signals.see_output, self._open, kwargs, output)

    def after_criterion(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The criterion's forward ends."""
        del module
        if self._open is not None and not is_set_apart():
            self._guard.run(SCALARS, self._signals.see_criterion, self._open, args, kwargs, output)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer's step begins; returns its arguments if the closure is to be wrapped."""
        wrapped: list[tuple[Any, Any]] = []
        # With a forward before it, that was the place.
        self.between_steps(lambda: self._open is None or id(optimizer) in self._open.stepped)
        self._guard.run(STEPS, self._step_begins, optimizer, args, kwargs, wrapped)
        return wrapped[0] if wrapped else None

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer's step ends."""
        del args, kwargs
        self._guard.run(STEPS, self._step_ends, optimizer)

    def _is_between(self) -> bool:
        return self._open is None or self._is_done(self._open)

    def charge(self, seconds: float) -> None:
        """So many seconds were spent beside the training loop; any budget pays for them."""
        self._handover.beside += seconds

    # What the user's Scope calls.

    def log(
        self,
        loss: object,
        target: object,
        output: object,
        grad_norm: object,
        scalars: dict[str, object],
    ) -> None:
        """Numbers and signals for the open step, or for the one that has just closed."""
        if self._guard.is_disabled(STEPS):
            return
        step = self._open
        self._pulses.log(loss, grad_norm, scalars)
        self._signals.see_logged(step, self._next - 1, loss, target, output)
        if step is None or self._is_done(step):
            self._offer()

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Gradients, complete by now, were clipped: the norm that torch found."""
        if self._guard.is_disabled(STEPS):
            return
        if not self.counts["forwards"]:
            self._begin()
        self._pulses.clip(norm, max_norm, self._scaling.clipping_scale())

    def hand_step(self) -> None:
        """The gradients are complete, and a hand-written update is about to use them."""
        step = self._begin()
        parameters = [p for _, _, p in owned_parameters(self.model) if p.requires_grad]
        self._read(parameters, Deferred())
        self._mark_stepped(step, 0)

    @property
    def optimizer_seen(self) -> bool:
        """Whether a torch optimizer has stepped on this model's parameters."""
        return self.optimizers.have_stepped

    def close_if_stepped(self) -> None:
        """Close the open step unless it still gathers gradients."""
        if self._open is not None and self._is_done(self._open):
            self.close_step()

    def settle(self) -> None:
        """Write down all that is known, closing the step unless it still gathers gradients."""
        if self.shards.active:
            # Other processes are asked for nothing: the step stays as open as it is with them.
            self.shards.attempt(self._handover.flush)
            self._offer(at_once=True)
        else:
            self.close_if_stepped()
            self._handover.flush()

    def _is_done(self, step: Step) -> bool:
        return bool(step.stepped) or self._scaling.has_skipped(step.stepped)

    def coverage(self) -> dict[str, Any]:
        """What was seen and what was not, and what it cost."""
        spent, whole = self._guard.seconds()
        now = {
            **self.optimizers.coverage(),
            "loss_seen": self._pulses.loss_seen,
            "unfinished_step": self._open is not None and not self._is_done(self._open),
            "seconds_in_hooks": spent,
            "seconds_watched": whole,
        }
        return self._account.total(now)

    def _release(self) -> None:
        """Step tracking has failed: hold nothing, gather nothing."""
        if self._taps is not None:
            self._taps.release()
        self._open = None
        self._pulses.release()

    def stop(self) -> None:
        """Take the module hooks away."""
        if self._taps is not None:
            self._taps.stop()

    def is_awaited(self) -> bool:
        """Whether other processes wait for this one at the next step that is recorded."""
        self.shards.look()
        return self.shards.active and not self._guard.is_disabled(STEPS)

    def leave(self, on_end: Callable[[], None]) -> None:
        """Record nothing more; at the end, which may be agreed with other processes, call back."""
        self._handover.recorder = None
        self._on_end = on_end
        self.shards.leave()

    # Opening and closing.

    def _forward_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        step = self._begin()
        step.entered = True
        self.counts["forwards"] += 1
        self.shards.attempt(self._signals.see_input, step, (args, kwargs))
        if self._taps is not None:
            self._taps.forward_begins(module)

    def _part_begins(self) -> None:
        self._begin().entered = True

    def _begin(self) -> Step:
        """The open step, unless it is done: then the next."""
        self.close_if_stepped()
        step = self._ensure_open()
        if step.rows is not None:
            # No backward runs now that could add to them from another thread.
            step.rows.condense()
        return step

    def _ensure_open(self) -> Step:
        if self._open is None:
            number = self._next
            self._next += 1
            due = self.shards.due(number)
            if self._guard.is_disabled(STEPS):
                return Step(number, None)
            rows = Rows() if due and (self._writes or self.shards.active) else None
            self._pulses.begin(number)
            self._scaling.step_opens(self._pulses.current())
            self._open = Step(number, rows)
            if rows is not None and self._taps is not None:
                self.shards.attempt(self._taps.arm, rows)
        return self._open

    def close_step(self) -> None:
        """Everything that belongs to the open step is known: hand it over."""
        step, self._open = self._open, None
        if step is None:
            return
        self.counts["closed_steps"] += 1
        if step.rows is not None:
            self.shards.attempt(self._finish_record, step)
            self.shards.merge(step.rows)
        pulse = self._pulses.current()
        self._scaling.step_closes(pulse, step.stepped)
        self._pulses.end()
        self.shards.attempt(self._handover.step_closed, step.rows)
        self._cadence.step_closed(recorded=step.rows is not None)
        if step.rows is not None:
            self.shards.recorded()
        self._events.closed(pulse)
        if self._writes and self.counts["closed_steps"] == LOSS_EXPECTED_AFTER:
            self._pulses.expect_loss()
        if step.rows is not None:
            for told in self.on_record:
                told(self.counts["recorded_steps"])

    def _finish_record(self, step: Step) -> None:
        if self._taps is not None:
            self._taps.finish()
        if step.reader is not None:
            step.reader.updates()
        self._signals.step_closed()
        if self._account.note(step.reader, self._taps):
            self.write_coverage(self.coverage())

    def _offer(self, *, at_once: bool = False) -> None:
        """What is known now, in case that the loop pauses."""
        step = self._open
        known = None if step is None or self.shards.pending else step.rows
        is_done = step is not None and self._is_done(step)
        self.shards.attempt(self._handover.offer, known, is_done=is_done, at_once=at_once)

    # The optimizer's step.

    def _step_begins(
        self, optimizer: Optimizer, args: Any, kwargs: Any, wrapped: list[tuple[Any, Any]]
    ) -> None:
        parameters = self.optimizers.parameters_of(optimizer)
        if not parameters:
            return
        if self._open is not None and id(optimizer) in self._open.stepped:
            self.close_step()
        step = self._ensure_open()
        self.optimizers.note(optimizer, recorded=step.rows is not None)
        left = self._scaling.left_to(optimizer, self._pulses.current())
        if step.rows is not None and self._scaling.is_hidden(optimizer, kwargs):
            return
        if step.rows is not None and self._taps is not None:
            self._scaling.label()
        read = partial(self._guard.run, STEPS, self._read, parameters, left)
        # With a closure the gradient exists when that first returns; nothing is updated before.
        # By then it may have opened the next step: another optimizer's turn is over.
        if (arguments := with_closure(args, kwargs, read)) is not None:
            wrapped.append(arguments)
        else:
            self._read(parameters, left)

    @torch.no_grad()
    def _read(self, parameters: list[Tensor], left: Deferred) -> None:
        """Read what the optimizer is given; at the first reading also all weights."""
        step = self._open
        if step is None or step.rows is None:
            return
        if step.reader is None:
            self._roster.resolve_parameters()
            if self._probes is not None:
                known = self._roster.parameters.values()
                self._probes.begin(step.number, (parameter for _, parameter in known))
            step.reader = ParameterReader(
                self._roster,
                step.rows,
                self._samples,
                self._probes,
                self._guard,
                split_only=not self._writes,
            )
            self.shards.begin(step.reader.parameters())
            self.shards.attempt(step.reader.weights)
        held = [*self.optimizers.held(), *parameters]
        self.shards.attempt(step.reader.read, parameters, held, left)
        if self._taps is not None:
            self.shards.attempt(self._taps.balance.read, step.rows, parameters, left)
            # The gradients of further forwards (a line search's, say) are nobody's.
            self._taps.disarm()
            self._taps.time.settle(parameters)

    def _step_ends(self, optimizer: Optimizer) -> None:
        step = self._open
        self.optimizers.ended(optimizer)
        parameters = self.optimizers.parameters_of(optimizer)
        if step is None or not parameters:
            return
        if step.reader is not None and step.rows is not None:
            with torch.no_grad():
                self.shards.attempt(step.reader.updates, parameters)
                self.shards.attempt(step.reader.states, optimizer)
            self.shards.updated(step.rows, parameters)
        self._pulses.rate(optimizer.param_groups[0].get("lr", math.nan))
        self._mark_stepped(step, id(optimizer))
        if not step.entered and not self._watching_parts:
            # The loop calls the model's parts one by one, as GANs do.
            self._watching_parts = True
            self.watch_parts()
            if self._taps is not None:
                self._taps.reach_compiled()

    def _mark_stepped(self, step: Step, optimizer: int) -> None:
        step.stepped.add(optimizer)
        if self._taps is not None:
            self._taps.balance.step_ended()
        if self._taps is not None and step.stepped >= self.optimizers.known():
            self._taps.time.release()
        self.counts["optimizer_steps"] += 1
        self._offer()

    def write_coverage(self, known: Mapping[str, Any]) -> None:
        """Write down what was seen so far."""
        self._handover.coverage(known)
