"""The uses of a module within a forward: of however many, the middle and the last are recorded.

A cell is called once per time step; how often is known when the forward is over. So every use is
measured, and its output's gradient awaited; which of them get a row is decided when the first
gradient comes back. No tensor of the user's is kept: of each use seven numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradscope.capture.derive import What
from gradscope.capture.entities import Roster
from gradscope.capture.precision import widened
from gradscope.capture.recorder import Rows

# Some 8 MB of seven numbers each and their hooks.
MOST_USES = 10_000


@dataclass(slots=True, eq=False)
class Sequence:
    """The uses of one module in one forward, in their order.

    first: the row of the module's first use, which stands for the module.
    """

    name: str
    module: nn.Module
    first: int
    outputs: list[Tensor] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    # Once it is known: what the gradient of a use is recorded as, by the index of the use.
    roles: dict[int, list[tuple[What, int]]] | None = None

    def add(self, output: Tensor, moments: Tensor) -> "Use":
        """One more use."""
        self.outputs.append(moments)
        self.shape = tuple(output.shape)
        return Use(self, len(self.outputs) - 1)

    @property
    def is_full(self) -> bool:
        """Whether further uses are not followed: which one is the last will not be known."""
        return len(self.outputs) >= MOST_USES

    def complete(self, rows: Rows, roster: Roster) -> None:
        """No further use will come: record the middle and the last, and of a cell the time."""
        count, self.roles = len(self.outputs), {}
        if self.is_full:
            self.outputs = []
            return
        middle = roster.companion(self.name, "middle", self.module, self.shape)
        last = roster.companion(self.name, "last", self.module, self.shape)
        for index, row in ((count // 2, middle), (count - 1, last)):
            rows.add("output", row, self.outputs[index])
            self.roles.setdefault(index, []).append(("output_gradient", row))
        self.outputs = []
        # Of other modules that are used often, the order of uses need not be that of time.
        if isinstance(self.module, nn.RNNCellBase):
            steps: tuple[tuple[int, What], ...] = (
                (0, "time_first"),
                (count // 2, "time_middle"),
                (count - 1, "time_last"),
            )
            for index, what in steps:
                self.roles.setdefault(index, []).append((what, self.first))
            add_time_steps(rows, self.first, count)


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a module in a forward."""

    sequence: Sequence
    index: int

    def roles(self) -> list[tuple[What, int]]:
        """What its gradient is recorded as, beside its own row."""
        return (self.sequence.roles or {}).get(self.index, [])


class Uses:
    """The sequences of uses in the forwards of a recorded step."""

    def __init__(self, roster: Roster, limit: int) -> None:
        self._roster = roster
        self._limit = limit
        # Modules that were used more often than each use has a row.
        self._often: set[str] = set()
        self._open: dict[nn.Module, Sequence] = {}

    def sequence(self, name: str, module: nn.Module, first: int) -> Sequence:
        """The one that the next use of the module belongs to."""
        found = self._open.get(module)
        # After a gradient another begins, as where a loop of the user's calls the cell.
        if found is None or found.roles is not None:
            found = self._open[module] = Sequence(name, module, first)
        return found

    def complete(self, rows: Rows | None) -> None:
        """The forward is over."""
        for sequence in self._open.values():
            self.settle(sequence, rows)
        self._open = {}

    def settle(self, sequence: Sequence, rows: Rows | None) -> None:
        """Decide which of its uses are recorded, unless that is done."""
        if sequence.roles is not None:
            return
        if len(sequence.outputs) > self._limit:
            self._often.add(sequence.name)
        is_followed = isinstance(sequence.module, nn.RNNCellBase) or sequence.name in self._often
        if rows is not None and is_followed:
            sequence.complete(rows, self._roster)
        else:
            sequence.roles, sequence.outputs = {}, []

    def arriving(self, use: Use | None, row: int | None, rows: Rows) -> Iterator[tuple[What, int]]:
        """What the gradient that arrives at this use is recorded as."""
        if row is not None:
            yield "output_gradient", row
        if use is not None:
            self.settle(use.sequence, rows)
            yield from use.roles()


def add_time_steps(rows: Rows, row: int, count: int) -> None:
    """Over how many time steps gradients were followed, once."""
    rows.add("time_steps", row, widened(torch.full((), count, device="cpu")), 1.0)
