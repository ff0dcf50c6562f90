"""Writing a run: event files, every record in the operating system's hands at once."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2, summary_pb2

from gradscope.errors import LogError
from gradscope.log import framing, lock, schema
from gradscope.quantities import CATALOGUE, Magnitudes, TableName
from gradscope.record import CountArray, Entity


def run_files(log_dir: Path) -> list[Path]:
    """The event files in a folder that are gradscope's own, oldest first."""
    return sorted(
        path
        for path in log_dir.iterdir()
        if path.name.startswith(schema.FILE_PREFIX) and path.name.endswith(schema.FILE_SUFFIX)
    )


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where a run stands that is to go on."""

    # The first step that is new, and the last number that a JSON record was given.
    step: int
    sequence: int
    # By column; None where the record that held the entity is damaged.
    entities: Mapping[TableName, tuple[Entity | None, ...]]
    meta: Mapping[str, Any]
    coverage: Mapping[str, Any]
    # Of all its files, in bytes.
    size: int


def make_run_dir(wanted: Path, *, resume: bool = False) -> Path:
    """Make the folder for a run: `wanted`, or a sibling if that holds a run that is not resumed.

    Raises LogError where a file is in the way or the folder can't be made or written.
    """
    log_dir, number = wanted, 1
    try:
        while not resume and log_dir.is_dir() and run_files(log_dir):
            number += 1
            whole = wanted.absolute()
            log_dir = whole.with_name(f"{whole.name}-{number}")
        log_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        message = f"log_dir={str(log_dir)!r}: a file is in the way; name a folder"
        raise LogError(message) from None
    except OSError as error:
        message = f"log_dir={str(wanted)!r} can't be made or read: {error}"
        raise LogError(message) from error
    return log_dir


def known_quantities() -> dict[TableName, list[str]]:
    """The quantities of each table that this version writes, in their order."""
    return {table: [quantity.name for quantity in listed] for table, listed in CATALOGUE.items()}


def _second(path: Path) -> int:
    """The time in a file's name; 0 in a name that is not the writer's."""
    digits = path.name.removeprefix(schema.FILE_PREFIX).partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


class RunWriter:
    """Appends the records of one run to an event file of its own.

    A record is handed to the operating system when it is written, so that a killed process
    loses nothing that was written. Not thread-safe: one thread writes. Raises OSError; LogError
    where a run is to be continued that another process writes to.
    """

    def __init__(
        self, log_dir: Path, meta: Mapping[str, Any], earlier: Continuation | None = None
    ) -> None:
        now = time.time()
        try:
            # Files are read in the order of their names, and clocks differ between machines.
            last = max(map(_second, run_files(log_dir)), default=0)
            name = (
                f"{schema.FILE_PREFIX}{max(int(now), last + 1):010d}.{time.monotonic_ns()}."
                f"{socket.gethostname()}.{os.getpid()}{schema.FILE_SUFFIX}"
            )
            # Unbuffered: what is written outlives the process.
            self._file: BinaryIO = (log_dir / name).open("xb", buffering=0)
            self._path = log_dir / name
        except OSError as error:
            message = f"log_dir={str(log_dir)!r} is not writable: {error}"
            raise LogError(message) from error
        self._sequence = 0
        # Bytes written.
        self.size = 0
        self._entities: dict[TableName, int] = {}
        try:
            self._begin(now, meta, earlier)
        except BaseException:
            self.discard()
            raise

    def _begin(self, now: float, meta: Mapping[str, Any], earlier: Continuation | None) -> None:
        lock.hold(self._file)
        if earlier is not None:
            # Of two that begin at once each sees the other: both have made and locked their files.
            folder = self._path.parent
            others = (path for path in run_files(folder) if path != self._path)
            lock.refuse_if_held(folder, others)
        self._write(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))
        if earlier is None:
            header = {
                "format_version": schema.FORMAT_VERSION,
                "quantities": known_quantities(),
                "meta": meta,
            }
            self._json(schema.HEADER, header)
        else:
            self._sequence = earlier.sequence
            self._entities = {table: len(known) for table, known in earlier.entities.items()}
            self._json(schema.RESUMED, {"step": earlier.step})

    def entities(self, table: TableName, new: Sequence[Entity]) -> None:
        """Append to the entity list of a table."""
        first = self._entities.get(table, 0)
        self._entities[table] = first + len(new)
        # With its place: a record lost to damage must not shift the names of later columns.
        content = {"table": table, "first": first, "entities": [asdict(entity) for entity in new]}
        self._json(schema.ENTITIES, content)

    def step(
        self,
        step: int,
        tables: Mapping[TableName, NDArray[np.float32]],
        scalars: Mapping[str, float],
        pulse: tuple[Sequence[str], NDArray[np.float64]] | None,
        histograms: tuple[int, Mapping[Magnitudes, CountArray]] | None = None,
    ) -> None:
        """One event: the tables of a step (quantities × entities), TensorBoard scalars, pulse.

        histograms: the exponent of the first bin, and the counts (entities × bins) of each kind.
        """
        values = [schema.table_value(name, array) for name, array in tables.items()]
        values += [schema.scalar_value(tag, number) for tag, number in scalars.items()]
        if pulse is not None:
            values.append(schema.pulse_value(*pulse))
        if histograms is not None:
            lowest, counted = histograms
            values += [schema.counts_value(lowest, counts, of) for of, counts in counted.items()]
        self._event(step, values)

    def problem(self, step: int, part: str, message: str) -> None:
        """Something that gradscope could not do, for the report."""
        self._json(schema.PROBLEM, {"step": step, "part": part, "message": message})

    def coverage(self, coverage: Mapping[str, Any]) -> None:
        """What was seen and what was not; the last one written holds."""
        self._json(schema.COVERAGE, coverage)

    def graph(self, graph: Mapping[str, Any]) -> None:
        """The autograd graph of a step; the last one written holds."""
        self._json(schema.GRAPH, graph)

    def show(self, step: int, values: Sequence[schema.Value]) -> None:
        """Something for TensorBoard alone; reading the run back passes over it."""
        self._event(step, values)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def discard(self) -> None:
        """Close the file and delete it: nothing was watched."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _json(self, tag: str, content: Mapping[str, Any]) -> None:
        # TensorBoard keeps one record per tag and step, and drops what does not increase:
        # these are numbered by their own sequence.
        self._sequence += 1
        self._event(self._sequence, [schema.json_value(tag, content)])

    def _event(self, step: int, values: Sequence[schema.Value]) -> None:
        summary = summary_pb2.Summary(value=values)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: event_pb2.Event) -> None:
        data = memoryview(framing.frame(event.SerializeToString()))
        while data:
            # An unbuffered write may take a part only.
            written = self._file.write(data)
            self.size += written
            data = data[written:]
