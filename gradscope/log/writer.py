"""Writing a run: one event file, every record in the operating system's hands at once."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2, summary_pb2

from gradscope.errors import LogError
from gradscope.log import framing, schema
from gradscope.quantities import CATALOGUE, TableName
from gradscope.record import CountArray, Entity


def run_files(log_dir: Path) -> list[Path]:
    """The event files in a folder that are gradscope's own, oldest first."""
    return sorted(
        path
        for path in log_dir.iterdir()
        if path.name.startswith(schema.FILE_PREFIX) and path.name.endswith(schema.FILE_SUFFIX)
    )


def make_run_dir(wanted: Path) -> Path:
    """Make the folder for a new run: `wanted`, or a sibling if that holds a run already.

    Raises LogError where a file is in the way or the folder can't be made or written.
    """
    log_dir, number = wanted, 1
    try:
        while log_dir.is_dir() and run_files(log_dir):
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


class RunWriter:
    """Appends the records of one run to one event file.

    A record is handed to the operating system when it is written, so that a killed process
    loses nothing that was written. Not thread-safe: one thread writes. Raises OSError.
    """

    def __init__(self, log_dir: Path, meta: Mapping[str, Any]) -> None:
        now = time.time()
        name = (
            f"{schema.FILE_PREFIX}{int(now):010d}.{time.monotonic_ns()}."
            f"{socket.gethostname()}.{os.getpid()}{schema.FILE_SUFFIX}"
        )
        try:
            # Unbuffered: what is written outlives the process.
            self._file: BinaryIO = (log_dir / name).open("xb", buffering=0)
        except OSError as error:
            message = f"log_dir={str(log_dir)!r} is not writable: {error}"
            raise LogError(message) from error
        self._sequence = 0
        self._entities: dict[TableName, int] = {}
        self._write(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))
        quantities = {table: [q.name for q in listed] for table, listed in CATALOGUE.items()}
        header = {
            "format_version": schema.FORMAT_VERSION,
            "quantities": quantities,
            "meta": meta,
        }
        self._json(schema.HEADER, header)

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
        histograms: tuple[int, CountArray] | None = None,
    ) -> None:
        """One event: the tables of a step (quantities × entities), TensorBoard scalars, pulse.

        histograms: the exponent of the first bin, and the counts (parameters × bins).
        """
        values = [schema.array_value(schema.TABLES[name], array) for name, array in tables.items()]
        values += [schema.scalar_value(tag, number) for tag, number in scalars.items()]
        if pulse is not None:
            values.append(schema.pulse_value(*pulse))
        if histograms is not None:
            values.append(schema.counts_value(*histograms))
        self._event(step, values)

    def problem(self, step: int, part: str, message: str) -> None:
        """Something that gradscope could not do, for the report."""
        self._json(schema.PROBLEM, {"step": step, "part": part, "message": message})

    def coverage(self, coverage: Mapping[str, Any]) -> None:
        """What was seen and what was not; the last one written holds."""
        self._json(schema.COVERAGE, coverage)

    def show(self, step: int, values: Sequence[schema.Value]) -> None:
        """Something for TensorBoard alone; reading the run back passes over it."""
        self._event(step, values)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

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
            data = data[self._file.write(data) :]
