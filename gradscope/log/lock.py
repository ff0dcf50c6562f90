"""One process at a time writes to a run: a lock on its event file, which goes with the process."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

from gradscope.errors import LogError

if sys.platform != "win32":
    import fcntl

_held: WeakSet[BinaryIO] = WeakSet()


def hold(file: BinaryIO) -> None:
    """Lock a file, opened for writing, until it is closed or the process ends, however it does.

    Does nothing where the system has no such locks.
    """
    if sys.platform != "win32":
        # Some network file systems have none.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held.add(file)


def refuse_if_held(log_dir: Path, files: Iterable[Path]) -> None:
    """Raise LogError if another process writes to one of the files of the run."""
    for path in files:
        if _is_held_elsewhere(path):
            message = (
                f"log_dir={str(log_dir)!r}: another process writes to the run that is to be "
                f"resumed ({path.name}); wait until it has ended, or leave resume out for a run "
                "of its own"
            )
            raise LogError(message)


def _is_held_elsewhere(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        # Two watches of one process know of each other, and the earlier may be about to end.
        own = (os.fstat(file.fileno()) for file in _held if not file.closed)
        return not any(os.path.samestat(path.stat(), held) for held in own)
    except OSError:
        return False
    return False


def _close_in_child() -> None:
    # A lock lives until the last copy of the file is closed: a data loader's worker, which
    # outlives a training that is killed, must not keep it.
    for file in list(_held):
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
