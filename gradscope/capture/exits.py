"""The end of a process in which somebody still watches."""

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...


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
