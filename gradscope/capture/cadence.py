"""Which steps are recorded."""

# Initialization faults show in the first steps, and cheaply.
_DENSE_STEPS = 10
_DEFAULT_INTERVAL = 10


class Cadence:
    """Holds which step is recorded next.

    What is to come after a recorded step is proposed, then agreed: of several processes that
    have to record the same steps none decides alone. Until it is agreed, every step is due.

    every: record each k-th step; None: the first ten steps, then every tenth.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._next = 0

    def begin_at(self, step: int, *, due: bool) -> None:
        """Steps are counted from here; whether the first is due whatever its number."""
        self._next = step if due else self.propose(step - 1)

    def due(self, step: int) -> bool:
        """Whether the step is recorded."""
        return step >= self._next

    def propose(self, step: int) -> int:
        """The step to be recorded after this one, as far as this process is concerned."""
        if self._every is None and step + 1 < _DENSE_STEPS:
            return step + 1
        interval = self._every or _DEFAULT_INTERVAL
        return (step // interval + 1) * interval

    def agree(self, step: int) -> None:
        """The next step to be recorded is settled."""
        self._next = step


def describe(every: int | None) -> str:
    """The cadence in words."""
    if every is None:
        return f"the first {_DENSE_STEPS} steps, then every {_DEFAULT_INTERVAL}th"
    return "every step" if every == 1 else f"one step in {every}"
