"""Module outputs and the gradients arriving at them, on recorded steps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture import statistics
from gradscope.capture.config import CaptureConfig
from gradscope.capture.context import is_set_apart
from gradscope.capture.entities import Roster, channels_first, watched_modules
from gradscope.capture.guard import OUTPUTS, Guard
from gradscope.capture.hooks import Hooks, on_gradient
from gradscope.capture.outputs import first_tensor
from gradscope.capture.recorder import Rows
from gradscope.capture.recurrent import TimeGradients
from gradscope.capture.scaling import LossScaling
from gradscope.capture.uses import MOST_USES, Use, Uses

# An output at or beyond these is saturated: the derivative there is below 6 % of its largest
# (tanh: |y| > 0.97, the limit of Karpathy's makemore, part 3; sigmoid is a scaled tanh).
_SATURATION: dict[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-0.97, 0.97),
    nn.Softsign: (-0.97, 0.97),
    nn.Sigmoid: (0.015, 0.985),
    nn.Hardsigmoid: (0.0, 1.0),
}


def _saturation(module: nn.Module) -> tuple[float, float] | None:
    # ReLU6 is one too, but its zeros are an activation's, not saturation.
    if type(module) is nn.Hardtanh:
        return module.min_val, module.max_val
    return _SATURATION.get(type(module))


@dataclass(slots=True)
class _Activity:
    """For each unit, the samples since it was last other than zero."""

    quiet: Tensor
    samples: int = 0

    def see(self, active: Tensor, samples: int) -> None:
        self.samples += samples
        self.quiet.add_(samples).masked_fill_(active, 0)


class ModuleTaps:
    """Hooks on the watched modules while a step is recorded; none in between."""

    def __init__(
        self, roster: Roster, config: CaptureConfig, guard: Guard, scaling: LossScaling
    ) -> None:
        self._roster = roster
        self._scaling = scaling
        self._config = config
        self._guard = guard
        self._hooks = Hooks(self)
        self._names = watched_modules(roster.model, config)
        self._rows: Rows | None = None
        guard.on_disable[OUTPUTS] = self.release
        self._uses: dict[nn.Module, int] = {}
        # Of each module in this step, the row of its first use.
        self._first: dict[nn.Module, int] = {}
        self._sequences = Uses(roster, config.max_uses)
        self.time = TimeGradients(roster, config, guard, scaling)
        self._activity: dict[int, _Activity] = {}
        # Of outputs by shape, in this forward: whether their units are dimension 1.
        self._channels_first: dict[tuple[int, ...], bool] = {}
        self._order_known = False
        # Of the step being recorded, for the coverage: table rows.
        self._ran_modules: set[nn.Module] = set()
        # What ran without gradients in a forward that began with them: measured, and kept
        # aside until a replay shows that a checkpoint did it, and not a no_grad block.
        self._aside: dict[nn.Module, tuple[int, Rows]] = {}
        self._in_forward = False
        self._ran: set[int] = set()
        self._expected: set[int] = set()
        self._seen: set[int] = set()

    def arm(self, rows: Rows) -> None:
        """Hook the modules: what they return goes to `rows`."""
        self._rows = rows
        self._ran, self._expected, self._seen = set(), set(), set()
        self._ran_modules, self._aside = set(), {}
        # Modules may have been replaced or added since the last time.
        self._names = watched_modules(self._roster.model, self._config)
        self._uses, self._channels_first, self._first = {}, {}, {}
        self._sequences.complete(None)
        self.time.arm(rows)
        for module in self._names:
            # Only to learn the order; afterwards one hook per module is enough.
            if not self._order_known or self.time.needs_start(module):
                self._hooks.before_forward(module, self._before)
            self._hooks.after_forward(module, self._after)

    def forward_begins(self) -> None:
        """The model's forward starts anew: uses are counted from the first."""
        self._uses = {}
        self._channels_first = {}
        self._in_forward = True
        self._sequences.complete(self._rows)
        self.time.forward_begins()
        if self._roster.model in self._names:
            # Its own hooks were registered while it began.
            self._roster.started(self._names[self._roster.model], 0)
            self.time.begins(self._roster.model)

    def forward_ends(self) -> None:
        """Or another begins, without gradients."""
        self._in_forward = False

    def disarm(self) -> None:
        """Remove the hooks; gradients of this step's outputs are still taken."""
        self._hooks.remove()
        self._order_known = self._order_known or bool(self._ran)

    def finish(self) -> None:
        """The step was read: what still arrives belongs to no step."""
        self.disarm()
        self.time.finish()
        self._sequences.complete(self._rows)
        if self._rows is not None:
            for row in sorted(self._ran & self._activity.keys()):
                activity = self._activity[row]
                if activity.samples >= self._config.dead_after_samples:
                    dead = (activity.quiet >= self._config.dead_after_samples).sum()
                    units = float(activity.quiet.numel())
                    self._rows.add("dead", row, dead.to(torch.float64), units)
        self._rows = None

    def release(self) -> None:
        """Let go of the step that is recorded."""
        self.disarm()
        self.time.finish()
        self._sequences.complete(None)
        self._rows, self._aside = None, {}

    def coverage(self) -> dict[str, object]:
        """Of the recorded step: modules and gradients that were expected, and those seen."""
        ran = [name for module, name in self._names.items() if module in self._ran_modules]
        silent = self._expected - self._seen
        return {
            "expected": len(self._names),
            "seen": len(ran),
            "never_ran": [name for name in self._names.values() if name not in set(ran)],
            "output_gradients_expected": len(self._expected),
            "output_gradients_seen": len(self._seen),
            "output_gradients_unseen": [self._roster.module_name(row) for row in sorted(silent)],
        }

    def _before(self, module: nn.Module, args: object, kwargs: object) -> None:
        del args, kwargs
        self._guard.run(OUTPUTS, self._start, module)

    def _start(self, module: nn.Module) -> None:
        # DataParallel's replicas carry the hooks of what they were copied from.
        if self._rows is not None and module in self._names and not is_set_apart():
            self._roster.started(self._names[module], self._uses.get(module, 0))
            self.time.begins(module)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        self._guard.run(OUTPUTS, self._see, module, args, kwargs, output)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, value: object) -> None:
        rows = self._rows
        if rows is None or module not in self._names:
            return
        output = first_tensor(value)
        if is_set_apart():
            if output is not None:
                self._see_replay(rows, module, output)
            return
        if not (torch.is_grad_enabled() or self._in_forward):
            return
        use = self._uses.get(module, 0)
        self._uses[module] = use + 1
        self._ran_modules.add(module)
        if output is None:
            return
        row = self._row(module, use, output)
        if torch.is_grad_enabled():
            self._see_use(rows, row, module, output)
            if row is not None:
                self.time.ends(row, module, (args, kwargs), value)
        elif use == 0 and row is not None:
            aside = Rows()
            self._measure(aside, row, module, output)
            self._aside[module] = (row, aside)
        else:
            # Which use a replay will repeat can't be told.
            self._aside.pop(module, None)

    def _row(self, module: nn.Module, use: int, output: Tensor) -> int | None:
        """The row of this use, if it has one to itself."""
        name, limit = self._names[module], self._config.max_uses
        if use >= limit:
            message = (
                f"{name} runs more than {limit} times in a forward: of its uses the first {limit}, "
                "the middle one and the last are recorded"
            )
            self._guard.say(OUTPUTS, message, aloud=False)
            return None
        row = self._roster.module(name, use, module, output)
        self._first.setdefault(module, row)
        return row

    def _see_use(self, rows: Rows, row: int | None, module: nn.Module, output: Tensor) -> None:
        sequence = self._sequences.sequence(self._names[module], module, self._first[module])
        if sequence.is_full:
            message = f"{sequence.name} runs {MOST_USES} times or more: not its middle and last use"
            self._guard.say(OUTPUTS, message, aloud=False)
            return
        moments = self._measure(rows, row, module, output)
        self._await_gradient(rows, row, output, sequence.add(output, moments))

    def _see_replay(self, rows: Rows, module: nn.Module, output: Tensor) -> None:
        """A re-entrant checkpoint repeats what ran without gradients: now they will come."""
        row, aside = self._aside.pop(module, (None, None))
        if row is not None and aside is not None:
            rows.entries += aside.entries
            self._await_gradient(rows, row, output, None)

    def _await_gradient(self, rows: Rows, row: int | None, output: Tensor, use: Use | None) -> None:
        # A leaf lives longer than the step, and so would its hook.
        awaited = output.requires_grad and not output.is_leaf
        if row is not None:
            self._ran.add(row)
            if awaited:
                self._expected.add(row)
        if awaited:
            on_gradient(output, _GradientTap(self, rows, row, use, self._guard))

    @torch.no_grad()
    def _measure(self, rows: Rows, row: int | None, module: nn.Module, output: Tensor) -> Tensor:
        """The moments of the output; adds what its own row holds, if it has one."""
        moments = statistics.moments(output)
        if row is None:
            return moments
        rows.add("output", row, moments)
        self._measure_units(rows, row, module, output)
        return moments

    def _measure_units(self, rows: Rows, row: int, module: nn.Module, output: Tensor) -> None:
        limits = _saturation(module)
        # What has no order has no end of its range.
        if limits is not None and not output.is_complex():
            outside = statistics.count_outside(output, *limits)
            rows.add("saturated", row, outside, float(output.numel()))
        if output.dim() < 2 or output.numel() == 0:  # noqa: PLR2004  (no batch dimension)
            return
        units_first = self._units_first(module, output)
        active = statistics.active_units(output, 1 if units_first else -1)
        activity = self._activity.get(row)
        if activity is None or activity.quiet.shape != active.shape:
            quiet = torch.zeros(active.shape, dtype=torch.int32, device=active.device)
            activity = self._activity[row] = _Activity(quiet)
        activity.see(active, output.shape[0])

    def _units_first(self, module: nn.Module, output: Tensor) -> bool:
        """Whether the units are dimension 1: behind convolutions, and what keeps their shape."""
        shape = tuple(output.shape)
        known = channels_first(module)
        if known is None:
            return self._channels_first.get(shape, False)
        self._channels_first[shape] = known
        return known

    def gradient_arrived(
        self, rows: Rows, row: int | None, use: Use | None, gradient: Tensor
    ) -> None:
        """The gradient of one output; ignored when its step is over."""
        if rows is not self._rows:
            return
        roles = list(self._sequences.arriving(use, row, rows))
        if row is not None:
            self._seen.add(row)
        if roles:
            with torch.no_grad():
                moments = self._scaling.unscaled(statistics.moments(gradient))
            for what, entity in roles:
                rows.add(what, entity, moments)


class _GradientTap:
    """A tensor hook: knows the row and the use, never the output."""

    __slots__ = ("_arrived", "_guard", "_row", "_rows", "_taps", "_use")

    def __init__(
        self, taps: ModuleTaps, rows: Rows, row: int | None, use: Use | None, guard: Guard
    ) -> None:
        self._taps, self._rows, self._row, self._use = taps, rows, row, use
        self._guard = guard
        self._arrived = False

    def __call__(self, gradient: Tensor) -> None:
        if self._arrived:
            self._guard.say(
                OUTPUTS,
                "several backwards went through one graph: what arrives at an output in each of "
                "them counts by itself, and is not added up",
                aloud=False,
            )
        self._arrived = True
        self._guard.run(
            OUTPUTS, self._taps.gradient_arrived, self._rows, self._row, self._use, gradient
        )
