"""What TensorBoard shows of the report, while training goes on and at its end."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gradscope.capture.guard import DISPLAY, FINDINGS, PICTURES, WORST_LAYERS, Guard
from gradscope.capture.recorder import Recorder
from gradscope.log import schema

if TYPE_CHECKING:
    from gradscope.analysis.report import Report
    from gradscope.analysis.rule import Rule
    from gradscope.record import Run

# What it may take of the time since the start, and what the first refresh takes, in seconds.
# Trainings that are too short for one get theirs at the end.
_SHARE = 0.01
_EXPECTED = 1.0


class Display:
    """Findings, worst layers and pictures in TensorBoard, refreshed at ever rarer steps.

    On the thread that trains: matplotlib's settings are the whole process's, and the user may be
    plotting there.

    read: the run so far, not more of it than may be in memory.
    """

    def __init__(
        self,
        read: Callable[[], "Run"],
        rules: Sequence["Rule[Any]"],
        recorder: Recorder,
        guard: Guard,
    ) -> None:
        self._read = read
        self._rules = rules
        self._recorder = recorder
        self._guard = guard
        self._started = time.monotonic()
        self._spent = 0.0
        self._expected = _EXPECTED
        self._next = 1

    def recorded(self, steps: int) -> None:
        """So many steps are recorded by now: refresh if it is time."""
        elapsed = time.monotonic() - self._started
        affordable = self._spent + self._expected <= _SHARE * elapsed
        if steps >= self._next and affordable:
            self._next = 2 * steps
            self.refresh()

    def refresh(self) -> None:
        """Show the report as it is now."""
        if not self._recorder.can_write():
            return
        begun = time.monotonic()
        self._guard.run(DISPLAY, self._refresh)
        self._expected = time.monotonic() - begun
        self._spent += self._expected

    def _refresh(self) -> None:
        from gradscope.analysis.analyzer import analyze  # noqa: PLC0415  (only when asked for)

        report = analyze(self._read(), self._rules)
        steps = report.run.steps
        step = int(steps[-1]) if len(steps) else 0
        parts = ((FINDINGS, _findings), (WORST_LAYERS, _worst_layers), (PICTURES, _pictures))
        for part, make in parts:
            self._guard.run(part, self._show, step, make, report)

    def _show(
        self, step: int, make: Callable[["Report"], list[schema.Value]], report: "Report"
    ) -> None:
        values = make(report)
        if values:
            self._recorder.call(lambda writer: writer.show(step, values))


def _findings(report: "Report") -> list[schema.Value]:
    from gradscope.reporters.tensorboard import findings_markdown  # noqa: PLC0415

    return [schema.text_value(schema.FINDINGS, findings_markdown(report))]


def _worst_layers(report: "Report") -> list[schema.Value]:
    from gradscope.reporters.tensorboard import worst_layers_markdown  # noqa: PLC0415

    return [schema.text_value(schema.WORST_LAYERS, worst_layers_markdown(report.run))]


def _pictures(report: "Report") -> list[schema.Value]:
    from gradscope.reporters.tensorboard import pictures  # noqa: PLC0415

    return [
        schema.image_value(f"{schema.PLUGIN}/{name}", png) for name, png in pictures(report).items()
    ]
