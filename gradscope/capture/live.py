"""Findings told while training goes on: what `watch(on_finding=...)` asks for."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.capture.cadence import BUDGET
from gradscope.capture.config import CaptureConfig
from gradscope.capture.guard import LIVE, ON_FINDING, Guard, in_words
from gradscope.capture.observer import Observer
from gradscope.capture.recorder import Recorder
from gradscope.errors import TrainingStopped

if TYPE_CHECKING:
    from gradscope.record import Run

# What cannot have been chance, and does not go away.
_LASTING = frozenset({"GS501", "GS502", "GS503"})
# So many seconds in all nobody notices: they are spent at ever rarer steps, the first at this
# number of recorded ones. What an analysis takes is not known before the first.
_FREE, _FIRST, _EXPECTED = 0.2, 4, 0.05
# How long an analysis waits for the record that is its reason: a disk may be slow.
_PATIENCE = 60.0


class News:
    """What is to be told of one analysis after the other: each code and layer once.

    A finding is told when two analyses in a row have it. An error that can't go away, as NaN, is
    told at once.
    """

    def __init__(self, least: Severity) -> None:
        self._least = least
        self._before: set[tuple[str, str | None]] = set()
        self._told: set[tuple[str, str | None]] = set()

    def of(self, findings: Iterable[Finding], *, last: bool = False) -> list[Finding]:
        """What is new; of the last analysis all that was not told."""
        found = {(f.code, f.layer): f for f in findings if f.severity >= self._least}
        news = {
            key: finding
            for key, finding in found.items()
            if key not in self._told and (last or key in self._before or _is_lasting(finding))
        }
        self._before = set(found)
        self._told |= news.keys()
        return list(news.values())


def _is_lasting(finding: Finding) -> bool:
    return finding.severity is Severity.ERROR and finding.code in _LASTING


class Live:
    """Judges the run on a thread of its own, and tells what it finds between two steps.

    Of a budget half may be taken, and is charged to it; where every k-th step is recorded, 1 % of
    the time. The thread reads the log, of a long run a part: memory stays bounded.

    snapshot: taken on the thread that trains, it reads the run on another one.
    """

    def __init__(
        self,
        config: CaptureConfig,
        snapshot: Callable[[], "Callable[[], Run]"],
        rules: Sequence[Rule[Any]],
        recorder: Recorder,
        guard: Guard,
    ) -> None:
        self._on_finding = on_finding = config.on_finding
        self._snapshot = snapshot
        self._rules = rules
        self._recorder = recorder
        self._guard = guard
        self._share = config.budget / 2 if config.every is None else BUDGET
        # Told of seconds that were spent beside the training loop.
        self._charge: Callable[[float], None] = lambda _: None
        self._news = News(Severity.ERROR if on_finding == "stop" else Severity.WARNING)
        self._follows = False
        self._untold: deque[Finding] = deque()
        self._telling = self._has_failed = self._closed = False
        self._process = os.getpid()
        self._started = time.monotonic()
        self._spent, self._expected, self._next = 0.0, _EXPECTED, _FIRST
        self._thread: threading.Thread | None = None
        # Of the thread's last analysis: what it took, and why it failed.
        self._cost = 0.0
        self._failure = ""

    # On the thread that trains.

    def follow(self, observer: Observer) -> None:
        """Analyze when it has recorded, tell between its steps, if anybody wants to know."""
        if self._on_finding is None:
            return
        self._follows = True
        observer.on_record.append(lambda steps: self._guard.run(LIVE, self._recorded, steps))
        observer.between_steps = self._between_steps
        self._charge = observer.charge

    def _recorded(self, steps: int) -> None:
        """So many steps are recorded by now: analyze if it is time, and none is going on."""
        if (self._thread is not None and self._thread.is_alive()) or not self._recorder.can_write():
            return
        self._settle()
        if not self._is_time(steps):
            return
        # The record that has just been handed over is read, too.
        written = threading.Event()
        self._recorder.call(lambda _: written.set())
        self._thread = threading.Thread(
            target=self._work, args=(written, self._snapshot()), name="gradscope-live", daemon=True
        )
        self._thread.start()

    def _is_time(self, steps: int) -> bool:
        after = self._spent + self._expected
        if after <= self._share * (time.monotonic() - self._started):
            return True
        if steps < self._next or after > _FREE:
            return False
        self._next = 2 * steps
        return True

    def _settle(self) -> None:
        """What the thread has left behind."""
        if self._cost:
            self._charge(self._cost)
            self._spent += self._cost
            self._expected, self._cost = self._cost, 0.0
        if self._failure:
            self._guard.disable(LIVE, self._failure)

    def _between_steps(self, is_between: Callable[[], bool]) -> bool:
        """A step may be about to begin: tell what was found; whether watching still goes on then.

        Not within the guard: what the user's function does and costs is the user's. Raises
        TrainingStopped, for "stop" or where that function does; weights are then what the last
        step left, whole.
        """
        was_closed = self._closed
        if self._has_news() and is_between():
            self._tell()
        return was_closed or not self._closed

    def _has_news(self) -> bool:
        # A forked child leaves it to its parent.
        return bool(self._untold) and not self._telling and self._process == os.getpid()

    def _tell(self) -> None:
        self._telling = True
        try:
            if self._on_finding == "stop":
                found = tuple(self._untold)
                self._untold.clear()
                raise TrainingStopped(found)
            while self._untold:
                self._call(self._untold.popleft())
        finally:
            self._telling = False

    def _call(self, finding: Finding) -> None:
        try:
            if callable(self._on_finding):
                self._on_finding(finding)
        except TrainingStopped:
            raise
        except Exception as error:  # noqa: BLE001  (the user's; training must not stop for it)
            message = f"on_finding failed at {finding.code} {finding.name}: {in_words(error)}"
            self._guard.say(ON_FINDING, message, aloud=not self._has_failed)
            self._has_failed = True

    def close(self) -> None:
        """Judge what was recorded, and tell what was not told; there is nothing left to stop."""
        self._closed = True
        if not self._follows or self._process != os.getpid():
            return
        if self._thread is not None:
            self._thread.join()
        self._settle()
        self._guard.run(LIVE, self._judge, self._snapshot(), last=True)
        if self._on_finding == "stop":
            return
        while self._has_news():
            try:
                self._tell()
            except TrainingStopped:
                continue

    # On the thread that analyzes.

    def _work(self, written: threading.Event, read: "Callable[[], Run]") -> None:
        try:
            written.wait(_PATIENCE)
            self._judge(read)
        except Exception as error:  # noqa: BLE001  (training must not stop because of us)
            self._failure = in_words(error)
        finally:
            self._cost = time.thread_time()

    def _judge(self, read: "Callable[[], Run]", *, last: bool = False) -> None:
        from gradscope.analysis.analyzer import analyze  # noqa: PLC0415  (as asked for)

        report = analyze(read(), self._rules)
        self._untold.extend(self._news.of(report.findings, last=last))
