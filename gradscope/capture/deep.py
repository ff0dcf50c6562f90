"""Histograms of outputs and of the gradients arriving there: at level "deep"."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.guard import HISTOGRAMS, Guard
from gradscope.capture.recorder import Rows
from gradscope.capture.scaling import divided

# Counted together: one call for each costs more than its entries.
_ENTRIES = 65_536

_What = Literal["output_magnitudes", "output_gradient_magnitudes"]


@dataclass(slots=True)
class OutputSamples:
    """Copies of samples of what passes in a recorded step, until there are enough to count."""

    guard: Guard
    wanted: bool
    _waiting: list[tuple[Rows, _What, int, Tensor]] = field(default_factory=list)
    _entries: int = 0

    def take_output(self, rows: Rows, row: int, output: Tensor) -> None:
        """A copy of a sample of the entries, whose counts go to `rows`."""
        if self.wanted:
            self.guard.run(HISTOGRAMS, self._take, rows, "output_magnitudes", row, output, None)

    def take_gradient(self, rows: Rows, row: int, gradient: Tensor, scale: Tensor | None) -> None:
        """The same of the gradient arriving there, divided by the scale."""
        if self.wanted:
            what: _What = "output_gradient_magnitudes"
            self.guard.run(HISTOGRAMS, self._take, rows, what, row, gradient, scale)

    def _take(
        self, rows: Rows, what: _What, row: int, tensor: Tensor, scale: Tensor | None
    ) -> None:
        sparse = tensor.is_sparse
        sample = statistics.evenly_spaced(tensor.coalesce().values() if sparse else tensor)
        # What it is of may be changed in place, or let go.
        sample = sample.clone() if scale is None else divided(sample, scale)
        self._waiting.append((rows, what, row, sample))
        self._entries += sample.numel()
        if self._entries >= _ENTRIES:
            self._count()

    def count(self) -> None:
        """Count all that was taken."""
        if self._waiting:
            self.guard.run(HISTOGRAMS, self._count)

    def forget(self) -> None:
        """Let go of what was taken."""
        self._waiting, self._entries = [], 0

    def _count(self) -> None:
        waiting = self._waiting
        self.forget()
        counted = statistics.magnitudes_of([sample for *_, sample in waiting])
        for (rows, what, row, _), counts in zip(waiting, counted, strict=True):
            rows.add(what, row, counts)
