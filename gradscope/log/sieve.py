"""Which steps of a long run are kept where not all of them may be."""

from collections import deque
from collections.abc import Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

# Initialization faults show in the first recorded steps, and what is the matter now in the latest.
_FIRST = _LATEST = 10
# Where the loss stops being finite, and is so again: so often, these steps are kept too.
_TURNS = 1_000

F64 = NDArray[np.float64]


class Sieve:
    """Keeps each `every`-th of the recorded steps, and the pulse of each `every`-th step.

    Beside them it keeps the first and the latest recorded steps, the last pulse, and that of the
    step at which the loss is not finite any more.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._recorded = 0
        # Recorded steps, and whether they stay.
        self._latest: deque[tuple[int, bool]] = deque()
        # The pulse of recorded steps, as often as it was written.
        self._beside: dict[int, list[tuple[list[str], F64]]] = {}
        self._last: tuple[list[str], F64] | None = None
        self._turns = 0
        self._was_finite = True

    def recorded(self, step: int) -> int | None:
        """A step was recorded; the earlier one that is to be dropped, if any."""
        if self._latest and self._latest[-1][0] == step:
            return None
        stays = self._recorded < _FIRST or self._recorded % self._every == 0
        self._recorded += 1
        self._latest.append((step, stays))
        if len(self._latest) <= _LATEST:
            return None
        former, stays = self._latest.popleft()
        if stays:
            return None
        self._beside.pop(former, None)
        return former

    def sifted(self, columns: list[str], rows: F64) -> F64:
        """Those rows of a pulse that are kept; rows of recorded steps are in `pulses`."""
        if not len(rows):
            return rows
        steps = rows[:, 0]
        kept = steps % self._every == 0
        if "loss_nonfinite" in columns:
            kept |= self._turning(rows[:, columns.index("loss_nonfinite")] > 0)
        if self._latest:
            step = self._latest[-1][0]
            at = np.flatnonzero(steps == step)
            if at.size:
                self._beside.setdefault(step, []).append((columns, rows[at]))
        # Copies: a row must not hold all others.
        self._last = (columns, rows[-1:].copy())
        result: F64 = rows[kept].copy()
        return result

    def _turning(self, broken: NDArray[np.bool_]) -> NDArray[np.bool_]:
        before = np.concatenate([[not self._was_finite], broken[:-1]])
        turns: NDArray[np.bool_] = broken != before
        self._was_finite = not broken[-1]
        self._turns += int(turns.sum())
        return turns if self._turns <= _TURNS else np.zeros_like(turns)

    def pulses(self) -> Iterator[tuple[list[str], F64]]:
        """Those beside the rows that were let through, the earlier written first."""
        yield from chain.from_iterable(self._beside.values())
        if self._last is not None:
            yield self._last

    def in_words(self) -> str:
        """What is left out."""
        return (
            f"all but about each {self._every}th step of a long run, as training needs the memory; "
            "gradscope.load reads it whole"
        )
