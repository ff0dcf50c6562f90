"""Which steps are recorded: every k-th, or as many as a share of the training time pays for."""

import math
import random
from collections.abc import Callable

from gradscope.capture.meter import Meter
from gradscope.errors import ConfigError, ConfigTypeError

BUDGET = 0.01

# Initialization faults show in the first steps, and cheaply.
_DENSE_STEPS = 10
# A budget is kept over any window of so many seconds, but for the first steps.
WINDOW = 60.0
# What nobody notices: as long as everything together has cost less, it is spent, at steps that are
# a tenth of the way apart.
_FREE = 0.2
_FREE_SPACING = 10
# However dear they are, a few steps show where training is: the next comes when it has gone on for
# three times as long.
_SPARSEST = 3
# Of two optimizers that take turns, every tenth step is always the same one's.
_JITTER = 0.25
# Time alone would let the log grow as long as training goes on: in bytes, what records may take of
# the disk, and so much more for every step; beside them lie 50 to 110 bytes of pulse.
_FREE_BYTES = 32_000_000
_BYTES_PER_STEP = 48
# An event is looked at for so many steps, if less than half of what a window allows is owed.
_EVENT_STEPS = 5
_RESERVE = 0.5


class Cadence:
    """Holds which step is recorded next.

    What is to come after a recorded step is proposed, then agreed: of several processes that
    have to record the same steps none decides alone. Until it is agreed, every step is due.

    every: record each k-th step; None: what the budget, a share of the training time, allows:
        the first ten steps, then as often as their cost is made up for.
    meter: knows what steps cost.
    written: the bytes that records have taken of the disk so far.
    """

    def __init__(
        self,
        every: int | None,
        budget: float = BUDGET,
        meter: Meter | None = None,
        written: Callable[[], int] = lambda: 0,
    ) -> None:
        self._every = every
        self._budget = budget
        self._meter = meter or Meter(lambda: 0.0)
        self._written = written
        # Bytes of the log before this session.
        self._earlier = 0
        self._next = 0
        # Seconds: what was spent beyond the share of the time that has passed.
        self._owed = 0.0
        # Steps that an event still wants to see; steps until the next may want any.
        self._wanted = self._quiet = 0
        self._pause = _EVENT_STEPS

    def begin_at(self, step: int, *, due: bool, written: int = 0) -> None:
        """Steps are counted from here; whether the first is due whatever its number.

        written: the bytes of the log up to there.
        """
        # Not all of it is records: what has been paid for by then is not asked for again.
        self._earlier = min(written, _FREE_BYTES + _BYTES_PER_STEP * step)
        self._next = step if due or self._every is None else self.propose(step - 1)

    def due(self, step: int) -> bool:
        """Whether the step is recorded."""
        return step >= self._next

    def propose(self, step: int) -> int:
        """The step to be recorded after this one, as far as this process is concerned."""
        if self._every is not None:
            return (step // self._every + 1) * self._every
        if step + 1 < _DENSE_STEPS:
            return step + 1
        return step + max(1, self._interval(step))

    def agree(self, step: int) -> None:
        """The next step to be recorded is settled."""
        self._next = step

    def _interval(self, step: int) -> int:
        meter = self._meter
        sparsest = wanted = float((_SPARSEST - 1) * step)
        if self._is_free(1):
            wanted = step / _FREE_SPACING
        gained = self._budget * meter.duration - meter.idle_cost
        missing = self._owed + meter.cost
        if missing < gained * wanted:
            wanted = missing / gained
        # The first step at which the disk has room again.
        room = (self._earlier + self._written() - _FREE_BYTES) / _BYTES_PER_STEP
        wanted = max(wanted, min(room - step, sparsest))
        # Its own generator: the user's random numbers stay what they are.
        draw = random.Random(step)  # noqa: S311
        return math.floor(wanted * draw.uniform(1 - _JITTER, 1 + _JITTER) + draw.random())

    def _is_free(self, records: int) -> bool:
        """Whether with so many more all that was spent still is what nobody notices."""
        return self._meter.spent + records * self._meter.cost < _FREE

    def step_closed(self, *, recorded: bool) -> None:
        """A step has ended."""
        passed, cost = self._meter.step_closed(recorded=recorded)
        # Neither saved up for more than one record, nor owed for longer than a window.
        most = self._budget * WINDOW
        self._owed = min(max(self._owed + cost - self._budget * passed, -self._meter.cost), most)
        self._quiet = max(self._quiet - 1, 0)

    def alarm(self) -> None:
        """Something has happened that is worth a closer look, if that can be paid for."""
        affordable = self._owed <= _RESERVE * self._budget * WINDOW or self._is_free(_EVENT_STEPS)
        if self._every is None and not self._quiet and affordable:
            self._wanted = _EVENT_STEPS
            # What goes on and on is looked at ever more rarely.
            self._pause *= 2
            self._quiet = self._pause

    def take_wanted(self) -> bool:
        """Whether an event wants to see the step that opens."""
        if not self._wanted:
            return False
        self._wanted -= 1
        return True


def checked_budget(budget: object) -> float:
    """The share of the training time that watching may cost; raises where it can't be one."""
    if budget is None:
        return BUDGET
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        message = f"budget={budget!r} is not a share of the training time, as 0.01"
        raise ConfigTypeError(message)
    if not 0 < budget < 1:
        message = (
            f"budget={budget!r} must be above 0 and below 1: 0.01 is 1 % of the training time, "
            "every=1 records each step"
        )
        raise ConfigError(message)
    return float(budget)


def describe(every: int | None, budget: float = BUDGET) -> str:
    """The cadence in words."""
    if every is None:
        return f"the first {_DENSE_STEPS} steps, then within {budget:.3g} of the training time"
    return "every step" if every == 1 else f"one step in {every}"
