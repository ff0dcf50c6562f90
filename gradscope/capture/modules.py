"""Module outputs and the gradients arriving at them, on recorded steps."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture import blindspots, compiled, statistics
from gradscope.capture.arrivals import Arrivals
from gradscope.capture.aside import SetAside
from gradscope.capture.balance import BiasBalance
from gradscope.capture.compiled import AwaitedGradients, Inlet, Place
from gradscope.capture.config import CaptureConfig
from gradscope.capture.context import is_set_apart, is_transformed
from gradscope.capture.deep import OutputSamples
from gradscope.capture.entities import Roster, watched_modules
from gradscope.capture.functional import FunctionalTaps
from gradscope.capture.guard import OUTPUTS, Guard
from gradscope.capture.hooks import Hooks
from gradscope.capture.outputs import first_tensor, why_unmeasured
from gradscope.capture.recorder import Rows
from gradscope.capture.recurrent import TimeGradients
from gradscope.capture.scaling import LossScaling
from gradscope.capture.similarity import OutputSimilarity
from gradscope.capture.train_eval import TrainEval
from gradscope.capture.units import Units
from gradscope.capture.uses import MOST_USES, Use, Uses


class ModuleTaps:
    """Hooks on the watched modules while a step is recorded; none in between.

    Where torch.compile has traced one, they stay: to a compiled graph a hook that comes or goes
    is a reason to compile anew.
    """

    def __init__(
        self, roster: Roster, config: CaptureConfig, guard: Guard, scaling: LossScaling
    ) -> None:
        self._roster = roster
        self._config = config
        self._guard = guard
        self._hooks = Hooks(self)
        self._calls = FunctionalTaps(roster, config, guard, self._see_call, self._note_start)
        self._names = watched_modules(roster.model, config)
        self._rows: Rows | None = None
        guard.on_disable[OUTPUTS] = self.release
        # Those that have hooks, and what compiled graphs know those by.
        self._hooked: set[nn.Module] = set()
        self._inlets: dict[nn.Module, Inlet] = {}
        self._stay = False
        # Whether a compiler has taken any of them into a graph.
        self._is_traced = False
        self._awaited = AwaitedGradients()
        # How much was compiled when silent modules were last looked into.
        self._graphs = 0
        self._listening = False
        self._starts = Hooks(self)
        self._uses: dict[str, int] = {}
        # Of each module in this step, the row of its first use.
        self._first: dict[nn.Module, int] = {}
        self._sequences = Uses(roster, config.max_uses)
        self.time = TimeGradients(roster, config, guard, scaling)
        self._units = Units(config)
        self._train_eval = TrainEval()
        # Of the step being recorded, for the coverage: table rows.
        self._ran_modules: set[nn.Module] = set()
        self._aside = SetAside()
        self._in_forward = False
        self._ran: set[int] = set()
        self._unmeasured: dict[nn.Module, str] = {}
        self._unregistered: dict[str, str] | None = None
        self._samples = OutputSamples(guard, wanted=config.counts_everything)
        self.balance = BiasBalance(roster, guard, scaling)
        self._similarity = OutputSimilarity(guard)
        self._arrivals = Arrivals(
            roster, guard, scaling, self._sequences, self._samples, balance=self.balance
        )

    def arm(self, rows: Rows) -> None:
        """Hook the modules: what they return goes to `rows`."""
        self._rows = rows
        self._arrivals.begin(rows)
        self._ran, self._ran_modules = set(), set()
        self._aside, self._unmeasured = SetAside(), {}
        self._awaited = AwaitedGradients()
        self._listening = True
        self.time.arm(rows)
        self._hook_modules()
        self._train_eval.arm(self._names)
        self.balance.begin()
        self._similarity.begin()
        self._count_uses()
        self._first = {}
        self._sequences.complete(None)
        if self._is_traced:
            self._calls.say_compiled()
        else:
            self._calls.arm(rows)

    def _hook_modules(self) -> None:
        # Modules may have been replaced or added since the last time.
        names = watched_modules(self._roster.model, self._config)
        if names.keys() != self._names.keys() or self._unregistered is None:
            self._unregistered = blindspots.unregistered(self._roster.model)
            self.balance.choose(names)
            self._similarity.choose(names)
        self._names = names
        self._inlets = {module: self._inlet(module) for module in self._names}
        fused = blindspots.fused(self._roster.model) & self._names.keys()
        self._unmeasured |= dict.fromkeys(fused, blindspots.FUSED)
        for module in self._names.keys() - self._hooked - fused:
            self._hooks.after_forward(module, self._after, self._inlets[module])
            if self.time.needs_start(module):
                self._starts.before_forward(module, self._before)
        self._hooked = self._hooked | self._names.keys()

    def _inlet(self, module: nn.Module) -> Inlet:
        if known := self._inlets.get(module):
            return known
        tell = partial(self._run, module)
        return Inlet(compiled.trace_output, self.traced, tell, self._bring)

    def traced(self, why_not: str | None) -> None:
        """A compiler takes a hook into its graph; or leaves it out, and why."""
        self._is_traced = True
        self._guard.run(OUTPUTS, self._note_trace, why_not)

    def _note_trace(self, why_not: str | None) -> None:
        if why_not == compiled.OLD_TORCH:
            self._guard.say(OUTPUTS, blindspots.OLD_TORCH)
            return
        self._keep_hooks()
        if why_not is not None:
            message = f"outputs in {why_not} are not recorded; parameters are"
            self._guard.say(OUTPUTS, message, aloud=False)

    def _keep_hooks(self) -> None:
        """Also hook what is traced next: the step that would do so opens when the graph runs."""
        if not self._stay:
            self._stay = True
            self._hook_modules()

    def note_transform(self) -> None:
        """A watched module runs outside of training's own forward: inside a transform, maybe."""
        if is_transformed():
            self._guard.say(OUTPUTS, blindspots.IN_TRANSFORMS, aloud=False)

    def _count_uses(self) -> None:
        self._uses = dict.fromkeys(self._names.values(), 0)
        self._units.forward_begins()

    def forward_begins(self, module: nn.Module) -> None:
        """The forward of the model, or a replica, starts anew: uses are counted from the first."""
        self._in_forward = True
        if self._rows is None:
            self._calls.forward_begins(module)
            return
        if self._listening and not self._hooked:
            self._hook_modules()
        self._count_uses()
        self._sequences.complete(self._rows)
        self.time.forward_begins()
        if self._roster.model in self._names:
            # Its own hooks were registered while it began.
            self._roster.started(self._names[self._roster.model], 0)
            self.time.begins(self._roster.model)
        self._calls.forward_begins(module)

    def forward_ends(self) -> None:
        """The forward of the model ends."""
        self._in_forward = False

    def stand_aside(self) -> None:
        """A forward without gradients begins: torch may run it faster where nothing is hooked."""
        # One within training's own leaves the hooks to that.
        if not self._in_forward and not self._stay:
            # A part that is called before the model itself has no hooks then.
            self.balance.unsure()
            self.detach()
            self._calls.stand_aside()

    def disarm(self) -> None:
        """Listen to no further forward; gradients of this step's outputs are still taken."""
        self._listening = False
        self._starts.remove()
        self._train_eval.release()
        self._calls.disarm()
        if not self._stay:
            self.detach()

    def detach(self) -> None:
        """Remove the hooks on modules."""
        self._starts.remove()
        self._hooks.remove()
        self._hooked = set()

    def stop(self) -> None:
        """Remove every hook; what was gathered can still be finished."""
        self.detach()
        self._calls.disarm()
        self._arrivals.detach()
        self.time.release()

    def finish(self) -> None:
        """The step was read: what still arrives belongs to no step."""
        self.disarm()
        self.time.finish()
        self._sequences.complete(self._rows)
        self._samples.count()
        if self._rows is not None:
            self._arrivals.leave_out(self._awaited.uncertain())
            self.reach_compiled()
            self._units.count_dead(self._rows, self._ran)
        self._arrivals.end()
        self._rows, self._awaited = None, AwaitedGradients()

    def reach_compiled(self) -> None:
        """Modules that did not run may have done so in a graph from before they had hooks."""
        if self._stay or self._ran_modules == self._names.keys():
            return
        known, self._graphs = self._graphs, compiled.graphs()
        if self._graphs > known:
            self._keep_hooks()
            compiled.forget_graphs()

    def release(self) -> None:
        """Let go of the step that is recorded."""
        self.disarm()
        self._samples.forget()
        self._arrivals.end()
        self.time.finish()
        self._sequences.complete(None)
        self._rows, self._aside, self._awaited = None, SetAside(), AwaitedGradients()

    def coverage(self) -> dict[str, object]:
        """Of the recorded step: modules and gradients that were expected, and those seen."""
        never = [name for module, name in self._names.items() if module not in self._ran_modules]
        expected, seen = self._arrivals.expected, self._arrivals.seen
        silent = self._roster.module_names(expected - seen)
        late = self._arrivals.reasons(silent)
        aside = self._roster.module_names(self._aside.table_rows() - self._ran)
        return {
            "expected": len(self._names),
            "seen": len(self._names) - len(never),
            "never_ran": never,
            "output_gradients_expected": len(expected),
            "output_gradients_seen": len(seen),
            "output_gradients_unseen": list(silent.values()),
            "reasons": {
                **(self._unregistered or {}),
                **{self._names[module]: why for module, why in self._unmeasured.items()},
                **dict.fromkeys(aside.values(), blindspots.WITHOUT_GRADIENTS),
                **{name: late[row] for row, name in silent.items()},
            },
        }

    def _before(self, module: nn.Module, args: object, kwargs: object) -> None:
        del args, kwargs
        self._guard.run(OUTPUTS, self._start, module)

    def _start(self, module: nn.Module) -> None:
        if self._rows is not None and module in self._names and not is_set_apart():
            self.time.begins(module)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        if self._listening:
            self._guard.run(OUTPUTS, self._see, module, (args, kwargs), output)

    def _run(self, module: nn.Module, output: Tensor | None, place: Place, awaited: bool) -> None:  # noqa: FBT001
        """A module has run inside a compiled graph."""
        if not self._listening:
            return
        if output is None:
            self._guard.disable(OUTPUTS, blindspots.CUDA_GRAPHS)
        else:
            self._guard.run(OUTPUTS, self._see, module, None, output, place if awaited else None)

    def _bring(self, gradient: Tensor, place: Place) -> None:
        """A compiled graph brings the gradient of an output."""
        self._awaited.arrive(place, gradient)

    def _see(
        self, module: nn.Module, inputs: Any, value: object, place: Place | None = None
    ) -> None:
        """A module has returned; `inputs` are None where a compiled graph tells of it."""
        rows = self._rows
        # DataParallel's replicas carry the hooks of what they were copied from.
        if rows is None or module not in self._names:
            return
        output = first_tensor(value)
        if is_set_apart():
            self.note_transform()
            self.balance.repeated(module)
            if output is not None:
                self._see_replay(rows, module, output)
            return
        if not (torch.is_grad_enabled() or self._in_forward):
            return
        use = self._uses[self._names[module]]
        self._note_start(self._names[module])
        self._uses[self._names[module]] = use + 1
        self._ran_modules.add(module)
        if torch.is_grad_enabled():
            self.balance.used(module)
        if output is None:
            self._unmeasured[module] = why_unmeasured(value)
            return
        row = self._row(module, use, output)
        if torch.is_grad_enabled():
            self._see_use(rows, row, module, output, place)
            if row is not None and inputs is not None:
                self.time.ends(row, module, inputs, value)
        elif row is not None:
            aside = Rows()
            self._measure(aside, row, module, output)
            self._aside.keep(module, row, aside)

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

    def _see_use(
        self, rows: Rows, row: int | None, module: nn.Module, output: Tensor, place: Place | None
    ) -> None:
        sequence = self._sequences.sequence(self._names[module], module, self._first[module])
        if sequence.is_full:
            message = f"{sequence.name} runs {MOST_USES} times or more: not its middle and last use"
            self._guard.say(OUTPUTS, message, aloud=False)
            return
        if module is self._roster.model:
            self.balance.model_returned(output)
        moments = self._measure(rows, row, module, output)
        self._await_gradient(rows, row, output, sequence.add(output, moments), place)

    def _note_start(self, name: str) -> None:
        """What has run began after all around it did: those say so when they end."""
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            around = ".".join(parts[:length])
            if around in self._uses:
                self._roster.started(around, self._uses[around])

    def _see_replay(self, rows: Rows, module: nn.Module, output: Tensor) -> None:
        """A re-entrant checkpoint repeats what ran without gradients: now they will come."""
        self._samples.count()
        if (known := self._aside.replayed(module)) is not None:
            row, aside = known
            if torch.is_grad_enabled():
                rows.entries += aside.entries
                self._await_gradient(rows, row, output, None)
            self._calls.say_passed_over()

    def _see_call(
        self, row: int, output: Tensor, limits: tuple[float, float] | None, *, has_units: bool
    ) -> None:
        rows = self._rows
        if rows is None:
            return
        with torch.no_grad():
            rows.add("output", row, statistics.moments(output))
            self._samples.take_output(rows, row, output)
            self._units.measure_call(rows, row, output, limits, has_units=has_units)
        self._await_gradient(rows, row, output, None)

    def _await_gradient(
        self,
        rows: Rows,
        row: int | None,
        output: Tensor,
        use: Use | None,
        place: Place | None = None,
    ) -> None:
        if row is not None:
            self._ran.add(row)
        if place is None and not output.requires_grad:
            return
        self._arrivals.expect(row)
        tap = self._arrivals.tap(rows, row, use)
        if place is None:
            self._arrivals.follow(output, tap)
        else:
            self._awaited.expect(place, tap)

    @torch.no_grad()
    def _measure(self, rows: Rows, row: int | None, module: nn.Module, output: Tensor) -> Tensor:
        """The moments of the output; adds what its own row holds, if it has one."""
        moments = statistics.moments(output)
        if row is not None:
            rows.add("output", row, moments)
            self._train_eval.measure(rows, row, module)
            self._samples.take_output(rows, row, output)
            self._similarity.measure(rows, row, module, output)
            if not output.is_sparse:
                self._units.measure(rows, row, module, output)
        return moments
