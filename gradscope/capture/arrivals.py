"""The gradients that arrive at the outputs of a recorded step."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.capture import blindspots, compiled, statistics
from gradscope.capture.balance import BiasBalance
from gradscope.capture.context import adds_to_gradients
from gradscope.capture.deep import OutputSamples
from gradscope.capture.derive import What
from gradscope.capture.entities import Roster
from gradscope.capture.guard import OUTPUTS, Guard
from gradscope.capture.hooks import Hooks, on_gradient
from gradscope.capture.recorder import Rows
from gradscope.capture.scaling import LossScaling
from gradscope.capture.uses import Use, Uses

# What the gradient of an output adds to a step's rows.
_ARRIVING: frozenset[What] = frozenset(
    {"output_gradient", "underflow", "output_gradient_magnitudes"}
)
_HALF = frozenset({torch.float16, torch.bfloat16})


class Arrivals:
    """Which outputs await a gradient, which got one, and why others did not."""

    def __init__(
        self,
        roster: Roster,
        guard: Guard,
        scaling: LossScaling,
        sequences: Uses,
        samples: OutputSamples,
        *,
        balance: BiasBalance,
    ) -> None:
        self._roster = roster
        self._guard = guard
        self._scaling = scaling
        self._sequences = sequences
        self._samples = samples
        self._balance = balance
        self._rows: Rows | None = None
        self._leaf_hooks = Hooks(self)
        # Table rows.
        self.expected: set[int] = set()
        self.seen: set[int] = set()
        # Why one may not have come.
        self._late: dict[int, str] = {}
        # The backward that was looked at last, and whether it prepares another.
        self._task = -1, False

    def begin(self, rows: Rows) -> None:
        """A step is recorded: what arrives goes to `rows`."""
        self._rows = rows
        self.expected, self.seen, self._late = set(), set(), {}

    def end(self) -> None:
        """What still arrives belongs to no step."""
        self.detach()
        self._rows = None

    def detach(self) -> None:
        """Remove the hooks on what outlives the step."""
        self._leaf_hooks.remove()

    def tap(self, rows: Rows, row: int | None, use: Use | None) -> "GradientTap":
        """What the gradient of one output is to be handed to."""
        return GradientTap(self, self._guard, rows, row, use)

    def expect(self, row: int | None) -> None:
        """A gradient should arrive at the output in this row."""
        if row is not None:
            self.expected.add(row)

    def follow(self, output: Tensor, tap: "GradientTap") -> None:
        """Have the tap told of the gradient of an output that requires one."""
        self._hook(output, tap)
        # When a view is changed in place, gradients pass it by, and reach what it shows.
        base = output._base if output._is_view() else None  # noqa: SLF001  (no public names)
        if tap.row is not None and base is not None and base.requires_grad:
            self._hook(base, tap.at_base)

    def _hook(self, tensor: Tensor, target: Callable[[Tensor], None]) -> None:
        if tensor.is_leaf:
            # A parameter, or the model's input.
            self._leaf_hooks.on_gradient(tensor, target)
        else:
            on_gradient(tensor, target)

    def leave_out(self, uncertain: Collection[int]) -> None:
        """Forget the gradients in these rows: which of them came to which can't be told."""
        if self._rows is not None and uncertain:
            names = ", ".join(self._roster.module_name(row) for row in sorted(uncertain))
            message = (
                f"compiled, and used several times in a step of which not all got a gradient: "
                f"which one did can't be told of {names}"
            )
            self._guard.say(OUTPUTS, message, aloud=False)
            self._rows.drop(_ARRIVING, uncertain)
            self.seen.difference_update(uncertain)

    def reasons(self, rows: Collection[int]) -> dict[int, str]:
        """Why nothing has come to these."""
        return {row: self._late.get(row, blindspots.NOT_IN_THE_LOSS) for row in rows}

    def arrived(self, tap: "GradientTap", gradient: Tensor) -> None:
        """The gradient of one output; ignored when its step is over."""
        if tap.rows is not self._rows:
            self._balance.missed(tap.use)
            return
        if self._is_derivative():
            if tap.row is not None:
                self._late[tap.row] = blindspots.IN_DERIVATIVES_ONLY
            return
        if tap.has_fired:
            self._guard.say(
                OUTPUTS,
                "several backwards went through one graph: what arrives at an output in each of "
                "them counts by itself, and is not added up",
                aloud=False,
            )
        is_first, tap.has_fired = not tap.has_fired, True
        roles = list(self._sequences.arriving(tap.use, tap.row, tap.rows))
        if tap.row is not None:
            self.seen.add(tap.row)
        moments = None
        if roles:
            with torch.no_grad():
                moments = self._scaling.unscaled(statistics.moments(gradient))
                if tap.row is not None:
                    self._count_underflows(tap.rows, tap.row, gradient)
                    self._samples.take_gradient(tap.rows, tap.row, gradient, self._scaling.scale)
            for what, entity in roles:
                tap.rows.add(what, entity, moments)
        self._balance.arrived(tap.use, gradient, moments, is_first=is_first)

    @staticmethod
    def _count_underflows(rows: Rows, row: int, gradient: Tensor) -> None:
        # Of wider formats hardly any: not worth a look.
        if gradient.dtype in _HALF and not gradient.is_sparse and gradient.numel():
            rows.add("underflow", row, statistics.underflows(gradient))

    def base_reached(self, tap: "GradientTap") -> None:
        """A gradient came to what an output is a view of."""
        if tap.row is not None and tap.rows is self._rows and not self._is_derivative():
            self._late[tap.row] = blindspots.PASSED_BY_VIEW

    def _is_derivative(self) -> bool:
        """Whether the gradient of a gradient is being prepared.

        What that does to the loss's own gradient comes in the backward of the loss.
        """
        if not torch.is_grad_enabled():
            return False
        task = torch._C._current_graph_task_id()  # noqa: SLF001  (no public name)
        if self._task[0] != task:
            self._task = task, not adds_to_gradients(self._roster.model.parameters())
        return self._task[1]


@dataclass(slots=True, eq=False)
class GradientTap:
    """A tensor hook: knows the row and the use, never the output."""

    arrivals: Arrivals
    guard: Guard
    rows: Rows
    row: int | None
    use: Use | None
    has_fired: bool = False

    def __call__(self, gradient: Tensor) -> None:
        """The gradient arrives at the output."""
        self.guard.run(OUTPUTS, self.arrivals.arrived, self, gradient)

    def at_base(self, gradient: Tensor) -> None:
        """The gradient arrives at what the output is a view of."""
        del gradient
        self.guard.run(OUTPUTS, self.arrivals.base_reached, self)


compiled.run_as_it_is(GradientTap.__call__)
compiled.run_as_it_is(GradientTap.at_base)
