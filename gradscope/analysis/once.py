"""What nearly all rules ask of a run is computed once."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

from gradscope.record import Run

T = TypeVar("T")


def once(function: Callable[[Run], T]) -> Callable[[Run], T]:
    """A pure function of a run that keeps its results as long as the runs live.

    A result must not hold the run. What raises is asked anew: an exception holds its frames, and
    these the run.
    """
    known: WeakKeyDictionary[Run, T] = WeakKeyDictionary()

    @wraps(function)
    def asked(run: Run) -> T:
        if run not in known:
            known[run] = function(run)
        return known[run]

    return asked
