"""Ends that are not the watch's own: of the process, or by another watch of the same model."""

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

from gradscope.capture.guard import warn


class _Closable(Protocol):
    def close(self) -> None: ...


_C = TypeVar("_C", bound=_Closable)


def close_at_exit(owner: _Closable) -> Callable[[], None]:
    """Close it when the process ends, if it is alive then; the function returned forgets that.

    A forked child ends, too; what it would close is its parent's.
    """
    reference, process = weakref.ref(owner), os.getpid()

    def close() -> None:
        alive = reference()
        if alive is not None and os.getpid() == process:
            alive.close()

    atexit.register(close)
    return lambda: atexit.unregister(close)


def close_earlier(owners: list[_C]) -> None:
    """Close and forget those that watch what is watched anew."""
    while owners:
        warn("this model was watched already; the earlier watch is closed")
        owners.pop().close()
