"""Which steps are recorded."""

# Initialization faults show in the first steps, and cheaply.
_DENSE_STEPS = 10
_DEFAULT_INTERVAL = 10


def is_recorded(step: int, every: int | None) -> bool:
    """Whether the step (counted from 0) is recorded.

    `every=None` records the first ten steps, then every tenth.
    """
    if every is None:
        return step < _DENSE_STEPS or step % _DEFAULT_INTERVAL == 0
    return step % every == 0


def describe(every: int | None) -> str:
    """The cadence in words."""
    if every is None:
        return f"the first {_DENSE_STEPS} steps, then every {_DEFAULT_INTERVAL}th"
    return "every step" if every == 1 else f"one step in {every}"
