"""What watching costs: of each step its duration, and how much of that was gradscope's."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

# The latest of each kind are looked at: enough that one pause does not count.
_LATEST = 9
# Of fewer the middle one says little.
_FEWEST = 3


class Meter:
    """Measures steps as they close.

    measure: the seconds that gradscope has taken so far, in the loop and beside it.

    A recorded step costs what was spent in it, or what it takes longer than others, whichever is
    more: what a device does on its own, and what hooks cost by being there, only the second shows.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self._closed_at: float | None = None
        self._measured = 0.0
        self._durations: deque[float] = deque(maxlen=_LATEST)
        self._recorded_durations: deque[float] = deque(maxlen=_LATEST)
        self._costs: deque[float] = deque(maxlen=_LATEST)
        self._idle_costs: deque[float] = deque(maxlen=_LATEST)
        # All that it has cost, in seconds.
        self.spent = 0.0

    @property
    def cost(self) -> float:
        """Of a recorded step, in seconds; 0 while none was seen."""
        excess = 0.0
        if min(len(self._durations), len(self._recorded_durations)) >= _FEWEST:
            excess = _middle(self._recorded_durations) - _middle(self._durations)
        return max(_middle(self._costs), excess)

    @property
    def idle_cost(self) -> float:
        """Of a step that is not recorded, in seconds."""
        return _middle(self._idle_costs)

    @property
    def duration(self) -> float:
        """Of a step that is not recorded, in seconds."""
        if self._durations:
            return _middle(self._durations)
        return max(_middle(self._recorded_durations) - self.cost, 0.0)

    def step_closed(self, *, recorded: bool) -> tuple[float, float]:
        """A step has ended: the seconds since the last one did, and what of it was gradscope's."""
        now, measured = time.perf_counter(), self._measure()
        cost = measured - self._measured
        passed = 0.0 if self._closed_at is None else now - self._closed_at
        self._closed_at, self._measured = now, measured
        (self._costs if recorded else self._idle_costs).append(cost)
        if passed:
            (self._recorded_durations if recorded else self._durations).append(passed)
        if recorded:
            cost = max(cost, self.cost)
        self.spent += cost
        return passed, cost


def _middle(numbers: Iterable[float]) -> float:
    known = list(numbers)
    return statistics.median(known) if known else 0.0
