"""The folder of a run: new, taken up again, or temporary."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradscope.capture.guard import warn
from gradscope.log.lock import refuse_if_held
from gradscope.log.reader import continuation
from gradscope.log.writer import Continuation, make_run_dir, run_files

# What a run is read by: a session with other settings is recorded differently.
_SETTINGS = ("model", "criterion", "cadence", "level", "loss_is_progress")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run goes, and the run that it continues there."""

    path: Path
    temporary: bool = False
    earlier: Continuation | None = None
    # What was made for it, the innermost first.
    made: tuple[Path, ...] = ()

    def discard(self) -> None:
        """Delete what was made for it and is empty: nothing was watched."""
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def run_folder(
    owner: object, log_dir: str | Path | None, *, resume: bool, writes: bool = True
) -> RunFolder:
    """Make the folder, or find the run in it; a temporary one goes with its owner.

    A process that does not write makes none: it is the writer's that is named.

    Raises LogError where it can't be made, or the run to be resumed can't be read or is being
    written by another process.
    """
    if not writes:
        return RunFolder(Path(log_dir or tempfile.gettempdir()), temporary=log_dir is None)
    if log_dir is None:
        temporary = Path(tempfile.mkdtemp(prefix="gradscope-"))
        weakref.finalize(owner, _remove, temporary, os.getpid())
        return RunFolder(temporary, temporary=True, made=(temporary,))
    wanted = Path(log_dir)
    missing = tuple(path for path in (wanted, *wanted.parents) if not path.exists())
    made = make_run_dir(wanted, resume=resume)
    if made != wanted:
        warn(f"{str(wanted)!r} holds a run already; this one goes to {str(made)!r}")
    new = missing if made == wanted else (made,)
    if not resume:
        return RunFolder(made, made=new)
    # Before it is read: where a run stands that somebody writes to is not known.
    refuse_if_held(made, run_files(made))
    return RunFolder(made, earlier=continuation(made), made=new)


def _remove(folder: Path, process: int) -> None:
    # A forked child ends, too; the folder is its parent's.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def changed_settings(earlier: Continuation, meta: Mapping[str, Any]) -> Iterator[str]:
    """What is watched otherwise than when the run began; a sentence each."""
    for name in _SETTINGS:
        before, now = earlier.meta.get(name), meta[name]
        if before != now:
            yield (
                f"resumed at step {earlier.step} with {name} {now!r}; the report goes by "
                f"{before!r}, with which the run began"
            )
