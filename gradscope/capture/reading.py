"""Reading a run back from its log while this process writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradscope.capture.coverage import with_problems
from gradscope.capture.guard import LOG, Guard
from gradscope.errors import LogError
from gradscope.log.reader import empty_run, load_part
from gradscope.record import Run


class Reading:
    """Reads the run in a folder, and adds what this process knows even if it was not written.

    writes: whether there is one; of several processes the others' run is empty, and says so.
    """

    def __init__(
        self, log_dir: Path, meta: Mapping[str, Any], guard: Guard, *, writes: bool
    ) -> None:
        self._log_dir = log_dir
        self._meta = meta
        self._guard = guard
        self._writes = writes

    def run(self, read: Callable[[Path], Run], coverage: Mapping[str, Any]) -> Run:
        """The run; empty where the log can't be read, which is then said."""
        run = empty_run(self._meta)
        if self._writes:
            try:
                run = read(self._log_dir)
            except LogError as error:
                self._guard.say(LOG, f"the log can't be read back: {error}")
        return with_problems(run, self._guard.problems, coverage)

    def beside(self, coverage: Mapping[str, Any]) -> Callable[[], Run]:
        """What reads the run, or a part of a long one, on another thread, with what is known now.

        It raises LogError where the log can't be read.
        """
        problems = list(self._guard.problems)
        return lambda: with_problems(load_part(self._log_dir), problems, coverage)
