"""The records of a run, read from its files one after the other and sorted by kind.

Of a run that is too long for the memory that may be taken, a part is kept.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2

from gradscope.errors import LogError, LogVersionError
from gradscope.log import framing, schema
from gradscope.log.sieve import Sieve
from gradscope.quantities import CATALOGUE, MAGNITUDES, Magnitudes, TableName
from gradscope.record import Entity, check_counts

# The names of the columns, and the rows: one per step.
Pulses: TypeAlias = tuple[list[str], NDArray[np.float64]]
# The quantities, and of each a row over the entities.
Rows: TypeAlias = tuple[NDArray[np.intp], NDArray[np.float32]]


@dataclass(slots=True)
class Collected:
    """The records of a run, sorted by kind."""

    header: dict[str, Any] | None = None
    # The first step of each file but the first.
    resumed: list[int] = field(default_factory=list)
    # The highest number of a JSON record.
    sequence: int = 0
    # By column.
    entities: dict[TableName, dict[int, Entity]] = field(
        default_factory=lambda: {table: {} for table in CATALOGUE}
    )
    # A step that is written twice (first as it stood, then complete) counts as it was last.
    tables: dict[TableName, dict[int, Rows]] = field(
        default_factory=lambda: {table: {} for table in CATALOGUE}
    )
    # The exponent of the first bin and the number of bins; packed counts by step.
    bins: tuple[int, int] | None = None
    counts: dict[Magnitudes, dict[int, bytes]] = field(
        default_factory=lambda: {of: {} for of in MAGNITUDES}
    )
    pulses: list[Pulses] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
    graph: dict[str, Any] | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    # What of a long run is kept; None: all.
    sieve: Sieve | None = None

    def drop(self, step: int) -> None:
        """Forget a recorded step."""
        for rows in self.tables.values():
            rows.pop(step, None)
        for packed in self.counts.values():
            packed.pop(step, None)


_TABLE_OF_TAG = {tag: table for table, tag in schema.TABLES.items()}
_MAGNITUDES_OF_TAG = {tag: of for of, tag in schema.COUNTS.items()}


def collect(files: Sequence[Path], most: int | None = None) -> Collected:
    """The run that the last file with a header begins, and that the files behind it continue.

    most: so many bytes of a longer run are kept, about; it is said what is left out.
    """
    found = Collected()
    every = 1 if most is None else -(-size_of(files) // most)
    for path in files:
        try:
            found = _collected(found, path, every)
        except LogError:
            raise
        except OSError as error:
            message = f"{str(path)!r} can't be read: {error}"
            raise LogError(message) from error
    if found.sieve is not None:
        found.pulses = [*found.sieve.pulses(), *found.pulses]
        found.left_out.append(found.sieve.in_words())
    return found


def size_of(files: Sequence[Path]) -> int:
    """Their bytes together. Raises LogError where that can't be asked."""
    try:
        return sum(path.stat().st_size for path in files)
    except OSError as error:
        message = f"the log can't be read: {error}"
        raise LogError(message) from error


def _collected(found: Collected, path: Path, every: int) -> Collected:
    """What was found so far, or a new run if the file begins one, with what is in the file."""
    leftover = framing.Leftover()
    with path.open("rb", buffering=_BUFFER) as file:
        records = framing.records(file, leftover)
        beginning = list(islice(records, _BEGINNING))
        tags = set(_tags(beginning))
        if schema.HEADER in tags:
            found = Collected(sieve=Sieve(every) if every > 1 else None)
        elif schema.RESUMED not in tags or found.header is None:
            # Of which run it is can't be told.
            found.left_out.append(f"{path.name}: it has no readable beginning")
            return found
        _sort_all(found, chain(beginning, records), leftover, path)
    return found


# Records are as large as some tens of kB.
_BUFFER = 1 << 20
# The version, then the header or what stands in its place.
_BEGINNING = 2


def _tags(records: Iterable[bytes]) -> Iterator[str]:
    for record in records:
        with suppress(DecodeError):
            yield from (value.tag for value in event_pb2.Event.FromString(record).summary.value)


def _sort_all(
    found: Collected, records: Iterable[bytes], leftover: framing.Leftover, path: Path
) -> None:
    for record in records:
        _sort_in(found, record, path)
    if leftover.damaged_records:
        found.left_out.append(f"{leftover.damaged_records} damaged records of {path.name}")
    if leftover.unread_bytes:
        found.left_out.append(
            f"the last {leftover.unread_bytes} bytes of {path.name}: "
            "a record torn by a kill, damaged, or still being written"
        )


# What decoding can raise on a record that is whole by its checksum, and yet not gradscope's.
_FOREIGN = (DecodeError, KeyError, IndexError, TypeError, ValueError, zlib.error)


def _sort_in(found: Collected, record: bytes, path: Path) -> None:
    try:
        event = event_pb2.Event.FromString(record)
        for value in event.summary.value:
            _take(found, event.step, value, path)
    except _FOREIGN as error:
        found.left_out.append(f"a record of {path.name} that is not understood: {error!r}")


def _take(found: Collected, step: int, value: schema.Value, path: Path) -> None:
    table = _TABLE_OF_TAG.get(value.tag)
    if table is not None:
        if found.header is None:
            message = f"{table} before the header"
            raise ValueError(message)
        quantities = len(found.header["quantities"][table])
        found.tables[table][step] = schema.read_table(value, quantities)
        if found.sieve is not None and (former := found.sieve.recorded(step)) is not None:
            found.drop(former)
    elif value.tag in _MAGNITUDES_OF_TAG:
        _take_counts(found, step, value)
    elif value.tag == schema.PULSE:
        columns, rows = schema.read_pulse(value)
        if columns[:1] != ["step"] or rows.shape[1:] != (len(columns),):
            message = f"a pulse of shape {rows.shape} with columns {columns}"
            raise ValueError(message)
        if found.sieve is not None:
            rows = found.sieve.sifted(columns, rows)
        if len(rows):
            found.pulses.append((columns, rows))
    elif value.tag in schema.NUMBERED:
        found.sequence = max(found.sequence, step)
        _take_json(found, value.tag, schema.read_json(value), path)


def _take_json(found: Collected, tag: str, content: dict[str, Any], path: Path) -> None:
    if tag == schema.ENTITIES:
        for column, entry in enumerate(content["entities"], start=content["first"]):
            entity = Entity(**{**entry, "shape": tuple(entry["shape"])})
            found.entities[content["table"]][column] = entity
    elif tag == schema.COVERAGE:
        found.coverage = content
    elif tag == schema.GRAPH:
        found.graph = content
    elif tag == schema.PROBLEM:
        # Resumed, a run meets the same limits again.
        if all(content["message"] != earlier["message"] for earlier in found.problems):
            found.problems.append(content)
    elif tag == schema.RESUMED:
        found.resumed.append(int(content["step"]))
    else:
        found.header = _header(content, path)


def _take_counts(found: Collected, step: int, value: schema.Value) -> None:
    """The counts of a step if they are whole, in the bins of the run."""
    lowest, bins, packed = schema.read_counts(value)
    check_counts(packed, bins)
    if found.bins not in (None, (lowest, bins)):
        message = f"histograms of {bins} bins from {lowest} on, in a run with {found.bins}"
        raise ValueError(message)
    found.bins = (lowest, bins)
    found.counts[_MAGNITUDES_OF_TAG[value.tag]][step] = packed


def _header(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """The header if it is one that this version reads."""
    version = header["format_version"]
    if version > schema.FORMAT_VERSION:
        message = (
            f"{str(path)!r} has format version {version}, this gradscope reads up to "
            f"{schema.FORMAT_VERSION}; upgrade with: pip install -U torch-gradscope"
        )
        raise LogVersionError(message)
    if "meta" not in header or set(header["quantities"]) != set(CATALOGUE):
        message = f"a header with {sorted(header)}"
        raise ValueError(message)
    return header
