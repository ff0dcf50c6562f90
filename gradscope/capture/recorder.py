"""From device buffers to the log: one copy per recorded step, everything slow in a thread.

The training thread collects small tensors on the device: float64, or float32 where it has none.
When a step closes they travel in one copy; the recorder's thread waits for it, derives the
quantities and writes.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope.capture import derive
from gradscope.capture.condensed import Row, condensed
from gradscope.capture.guard import in_words
from gradscope.capture.pulse import Pulse
from gradscope.capture.statistics import LOWEST_OCTAVE
from gradscope.capture.widening import widened
from gradscope.log import schema
from gradscope.log.scalars import layer_scalars, pulse_scalars, table_scalars
from gradscope.log.writer import RunWriter
from gradscope.quantities import Magnitudes, TableName
from gradscope.record import CountArray

F64 = NDArray[np.float64]

# Half of what a kill may cost: a step that is done is written when it is this old, whether or
# not the next has begun; the other half is for the writing.
PATIENCE = 1.0
# Beyond this many rows of a step what can be added up is.
_MANY_ROWS = 4_096
# Beyond this many unwritten packets training waits for the disk: nothing is lost, and memory
# stays bounded.
_QUEUE = 64


@dataclass(slots=True)
class Rows:
    """The statistics of one recorded step, on the device."""

    entries: list[Row] = field(default_factory=list)
    # Quantities of parameters that the host knows.
    flags: dict[str, dict[int, float]] = field(default_factory=dict)
    # Twice what was left the last time: the work grows with the rows, not with its square.
    _enough: int = 0

    def condense(self) -> None:
        """Between forwards: a step that does not end must not fill the memory."""
        if len(self.entries) >= max(_MANY_ROWS, self._enough):
            self.entries = condensed(self.entries)
            self._enough = 2 * len(self.entries)

    def add(self, what: derive.What, entity: int, numbers: Tensor, *known: float) -> None:
        """Add a row of numbers."""
        self.entries.append((what, entity, numbers, known))

    def drop(self, kinds: Collection[derive.What], entities: Collection[int]) -> None:
        """Forget rows of these kinds and entities."""
        self.entries = [
            entry for entry in self.entries if entry[0] not in kinds or entry[1] not in entities
        ]

    def flag(self, quantity: str, entity: int, value: float) -> None:
        """Set a quantity of a parameter."""
        self.flags.setdefault(quantity, {})[entity] = value

    def copy(self) -> "Rows":
        """As they stand now."""
        return Rows(list(self.entries), {name: dict(known) for name, known in self.flags.items()})


@dataclass(frozen=True, slots=True)
class Shown:
    """What TensorBoard gets beside the fixed scalars: the user's; single parameters by row."""

    user_tags: frozenset[str]
    layers: Mapping[str, int]
    histograms: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Packet:
    """What goes to the thread: the rows of a step (None: not recorded) and some pulses."""

    step: int
    rows: Rows | None
    pulses: tuple[Pulse, ...]
    sizes: dict[TableName, int]
    shown: Shown


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one kind that lie one behind the other on one device."""

    what: derive.What
    device: torch.device
    dtype: torch.dtype
    width: int
    entities: list[int] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    # Further numbers that the host knows.
    known: list[tuple[float, ...]] = field(default_factory=list)


def _blocks(entries: Iterable[Row]) -> list[_Block]:
    """The rows of a step, those of a kind together."""
    found: dict[tuple[Any, ...], _Block] = {}
    for what, entity, numbers, known in entries:
        key = (what, numbers.device, numbers.dtype, numbers.numel())
        block = found.get(key)
        if block is None:
            block = found[key] = _Block(*key)
        block.entities.append(entity)
        block.numbers.append(numbers)
        block.known.append(known)
    return list(found.values())


class _Transfer:
    """The numbers of a packet on their way to the host: one copy per device."""

    def __init__(self, packet: Packet) -> None:
        self.packet = packet
        self._blocks = _blocks(packet.rows.entries if packet.rows else ())
        by_device: dict[torch.device, list[Tensor]] = {}
        for block in self._blocks:
            by_device.setdefault(block.device, []).append(torch.stack(block.numbers).reshape(-1))
        for pulse in packet.pulses:
            for values in pulse.values.values():
                for value in values:
                    if isinstance(value, Tensor):
                        by_device.setdefault(value.device, []).append(value.reshape(-1))
        self._sent = {
            device: to_host(device, torch.cat(tensors)) for device, tensors in by_device.items()
        }

    def arrive(self) -> tuple[derive.RowsByKind, list[dict[str, float]]]:
        """Wait for the copies; the rows by kind, and the numbers of each pulse."""
        streams: dict[torch.device, F64] = {}
        for device, (numbers, event) in self._sent.items():
            if event is not None:
                event.synchronize()
            streams[device] = numbers.cpu().numpy().astype(np.float64, copy=False)
        at = dict.fromkeys(streams, 0)

        def take(device: torch.device, count: int) -> F64:
            start = at[device]
            at[device] = start + count
            return streams[device][start : at[device]]

        rows: derive.RowsByKind = {}
        for block in self._blocks:
            size = len(block.entities)
            matrix = take(block.device, size * block.width).reshape(size, block.width)
            if block.dtype == torch.float32:
                matrix = widened(block.what, matrix)
            if block.known[0]:
                known = np.fromiter(chain.from_iterable(block.known), np.float64)
                matrix = np.hstack([matrix, known.reshape(size, -1)])
            entities: Sequence[int] = block.entities
            if block.what in rows:
                # Of a model on several devices, or in several formats.
                earlier, above = rows[block.what]
                entities, matrix = [*earlier, *entities], np.vstack([above, matrix])
            rows[block.what] = entities, matrix
        pulses = []
        for pulse in self.packet.pulses:
            means = {}
            for name, values in pulse.values.items():
                read = [
                    float(take(value.device, 1)[0]) if isinstance(value, Tensor) else value
                    for value in values
                ]
                means[name] = sum(read) / pulse.count(name)
            pulses.append(means)
        return rows, pulses


def to_host(device: torch.device, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and what to wait for before it is read; None: nothing."""
    if device.type != "cuda":
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True, device="cpu")
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return host, event


@dataclass(frozen=True, slots=True)
class _Offer:
    """A packet that is to be written when it is due, once its numbers are ready."""

    due: float
    packet: Packet
    ready: torch.cuda.Event | None


def _mark_stream() -> torch.cuda.Event | None:
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class Recorder:
    """Owns the thread and the log file of one run.

    In a forked child, which has no such thread and must not write into the parent's file, every
    call does nothing.
    """

    def __init__(self, writer: RunWriter, on_failure: WeakMethod[Callable[[str], None]]) -> None:
        self._writer = writer
        self._on_failure = on_failure
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE)
        self._offer: _Offer | None = None
        self._offering = threading.Lock()
        self._failed = False
        self._abandoned = False
        self._process = os.getpid()
        # What the thread has computed for, what records take of the disk; who is told of pulses,
        # weakly.
        self.seconds = 0.0
        self.record_bytes = 0
        self.on_pulses: WeakMethod[Callable[[Sequence[Mapping[str, float]]], None]] | None = None
        self._thread = threading.Thread(target=self._work, name="gradscope", daemon=True)
        self._thread.start()

    def submit(self, packet: Packet) -> None:
        """Write a packet."""
        if self.can_write():
            with self._offering:
                self._offer = None
            transfer = _Transfer(packet)
            self._put(lambda: self._write(transfer))

    def offer(self, packet: Packet) -> None:
        """A step that may still change: it is written if none is submitted soon."""
        if self.can_write():
            ready = _mark_stream()
            with self._offering:
                # What changes often must not put the writing off.
                due = self._offer.due if self._offer else time.monotonic() + PATIENCE
                self._offer = _Offer(due, packet, ready)

    def call(self, write: Callable[[RunWriter], None]) -> None:
        """Write something else, in its turn."""
        if self.can_write():
            self._put(lambda: write(self._writer))

    def flush(self) -> None:
        """Wait until everything that was submitted is written."""
        if self._process == os.getpid() and self._thread.is_alive():
            self._queue.join()

    def close(self) -> None:
        """Write the rest, end the thread, close the file. Closing twice is harmless."""
        if self._process != os.getpid():
            return
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def abandon(self) -> None:
        """Close soon. For finalizers, which may run on any thread at any moment: no waiting."""
        self._abandoned = True

    def can_write(self) -> bool:
        """Whether anything that is handed over still gets written."""
        return not self._failed and self._process == os.getpid()

    def _put(self, item: Callable[[], None]) -> None:
        while not self._failed:
            try:
                self._queue.put(item, timeout=PATIENCE)
            except queue.Full:
                self._failed = not self._thread.is_alive()
            else:
                return

    def _work(self) -> None:
        try:
            while True:
                try:
                    item = self._queue.get(timeout=PATIENCE / 4)
                except queue.Empty:
                    if self._abandoned:
                        return
                    self._attempt(self._take_offer)
                    continue
                try:
                    if item is None:
                        return
                    self._attempt(item)
                finally:
                    self._queue.task_done()
        finally:
            self._writer.close()

    def _attempt(self, action: Callable[[], None]) -> None:
        # After a failure the queue is still emptied, so that training never waits for it.
        if self._failed:
            return
        try:
            action()
            self.seconds = time.thread_time()
        except Exception as error:  # noqa: BLE001  (a full disk must not stop training)
            self._failed = True
            # Weakly: the thread must not keep the model alive.
            on_failure = self._on_failure()
            if on_failure is not None:
                on_failure(in_words(error))

    def _take_offer(self) -> None:
        with self._offering:
            offer = self._offer
            if offer is None or time.monotonic() < offer.due:
                return
            self._offer = None
        if offer.ready is not None:
            # The numbers were made on the training thread's stream; only this thread waits.
            offer.ready.synchronize()
        self._write(_Transfer(offer.packet))

    def _write(self, transfer: _Transfer) -> None:
        rows, pulses = transfer.arrive()
        if self.on_pulses is not None and (arrived := self.on_pulses()) is not None:
            arrived(pulses)
        packet = transfer.packet
        steps = [pulse.step for pulse in packet.pulses]
        tables: dict[TableName, NDArray[np.float32]] = {}
        counts: dict[Magnitudes, CountArray] = {}
        scalars = pulse_scalars(pulses, packet.shown.user_tags)
        if packet.rows is not None:
            tables = derive.tables(rows, packet.rows.flags, packet.sizes)
            counts = derive.histograms(rows, packet.sizes)
            scalars |= table_scalars(tables)
            scalars |= layer_scalars(tables["parameters"], packet.shown.layers)
        histograms = (LOWEST_OCTAVE, counts)
        before = self._writer.size
        self._writer.step(packet.step, tables, scalars, _pulse_rows(steps, pulses), histograms)
        if packet.rows is not None:
            self.record_bytes += self._writer.size - before
        if "grad" in counts and packet.shown.histograms:
            shown = _histograms_shown(counts["grad"], packet.shown.histograms)
            self._writer.show(packet.step, shown)


def _histograms_shown(counts: CountArray, rows: Mapping[str, int]) -> list[schema.Value]:
    """Single parameters by name, over log10 of the magnitude: TensorBoard's axis is linear."""
    octaves = np.arange(LOWEST_OCTAVE, LOWEST_OCTAVE + counts.shape[1] + 1)
    return [
        schema.histogram_value(f"log10_gradient/{name}", octaves * np.log10(2), counts[row])
        for name, row in rows.items()
        if counts[row].any()
    ]


def _pulse_rows(
    steps: Sequence[int], pulses: Sequence[dict[str, float]]
) -> tuple[list[str], F64] | None:
    if not pulses:
        return None
    names = list(dict.fromkeys(name for known in pulses for name in known))
    rows = [
        [step, *(known.get(name, np.nan) for name in names)]
        for step, known in zip(steps, pulses, strict=True)
    ]
    return ["step", *names], np.array(rows, np.float64)
