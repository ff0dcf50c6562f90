"""When what was recorded goes to the recorder, and as what packets."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from gradscope.capture.entities import Roster
from gradscope.capture.pulse import Pulse
from gradscope.capture.pulses import Pulses
from gradscope.capture.recorder import PATIENCE, Packet, Recorder, Rows
from gradscope.capture.selection import Selection
from gradscope.log.writer import RunWriter


class Handover:
    """Hands the records and pulses of one model's training to the recorder, once there is one."""

    def __init__(self, roster: Roster, selection: Selection, pulses: Pulses) -> None:
        self._roster = roster
        self._selection = selection
        self._pulses = pulses
        self._flushed_at = time.monotonic()
        self.recorder: Recorder | None = None
        # Seconds that something else than the recorder took beside the training loop.
        self.beside = 0.0

    def seconds(self) -> float:
        """What other threads have computed for so far, beside the training loop."""
        return self.beside + (0.0 if self.recorder is None else self.recorder.seconds)

    def record_bytes(self) -> int:
        """What the log's records have taken of the disk."""
        return 0 if self.recorder is None else self.recorder.record_bytes

    def step_closed(self, rows: Rows | None) -> None:
        """A step is complete: hand over its record, or the pulses if it is time."""
        waited = time.monotonic() - self._flushed_at
        if rows is not None or self._pulses.is_full or waited > PATIENCE:
            self.flush(rows)
        else:
            self.offer(None, is_done=False)

    def flush(self, rows: Rows | None = None) -> None:
        """Hand over all that has gathered."""
        if self.recorder is None:
            # The recorder is another process's.
            self._pulses.pending = []
        elif self._pulses.pending:
            self._write_new_entities(self.recorder)
            self.recorder.submit(self._packet(rows, self._pulses.pending))
            self._pulses.pending = []
            self._flushed_at = time.monotonic()

    def offer(self, rows: Rows | None, *, is_done: bool, at_once: bool = False) -> None:
        """What is known now of the open step if it is done, in case that the loop pauses.

        at_once: it is written now, and again when the step closes.
        """
        if self.recorder is None:
            return
        write = self.recorder.submit if at_once else self.recorder.offer
        if is_done:
            self._write_new_entities(self.recorder)
            copied = rows.copy() if rows is not None else None
            write(self._packet(copied, self._pulses.known()))
        elif self._pulses.pending:
            write(self._packet(None, self._pulses.pending))

    def coverage(self, coverage: Mapping[str, Any]) -> None:
        """Write down what was seen so far."""
        if self.recorder is not None:
            self.recorder.call(partial(RunWriter.coverage, coverage=coverage))

    def graph(self, graph: Mapping[str, Any]) -> None:
        """Write down the autograd graph of a step."""
        if self.recorder is not None:
            self.recorder.call(partial(RunWriter.graph, graph=graph))

    def _packet(self, rows: Rows | None, pulses: list[Pulse]) -> Packet:
        # The recorder's thread reads them; the last may still be added to.
        fixed = (*pulses[:-1], pulses[-1].copy())
        shown = self._selection.shown(self._pulses.user_tags)
        return Packet(pulses[-1].step, rows, fixed, self._roster.sizes(), shown)

    def _write_new_entities(self, recorder: Recorder) -> None:
        for table, new in self._roster.take_new().items():
            recorder.call(partial(RunWriter.entities, table=table, new=new))
