"""Reading a run back from its folder, also while it is written and after a kill."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2

from gradscope.errors import LogError, LogVersionError, NoRunError
from gradscope.log import framing, schema
from gradscope.log.writer import Continuation, known_quantities, run_files
from gradscope.quantities import CATALOGUE, MAGNITUDES, Magnitudes, TableName
from gradscope.record import (
    Entity,
    Histograms,
    Run,
    Table,
    no_histograms,
    pack_counts,
    unpack_counts,
)


@dataclass(slots=True)
class _Collected:
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
    tables: dict[TableName, dict[int, NDArray[np.float32]]] = field(
        default_factory=lambda: {table: {} for table in CATALOGUE}
    )
    # The exponent of the first bin and the number of bins; packed counts by step.
    bins: tuple[int, int] | None = None
    counts: dict[Magnitudes, dict[int, bytes]] = field(
        default_factory=lambda: {of: {} for of in MAGNITUDES}
    )
    pulses: list[tuple[list[str], NDArray[np.float64]]] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


_TABLE_OF_TAG = {tag: table for table, tag in schema.TABLES.items()}
_MAGNITUDES_OF_TAG = {tag: of for of, tag in schema.COUNTS.items()}


def load(log_dir: str | PathLike[str]) -> Run:
    """Read the run that `gradscope.watch(..., log_dir=...)` wrote.

    Works while the run is still being written and after it was killed: what could not be read
    is said in `run.meta["left_out"]`. Neither the model nor torch is needed.

    Raises NoRunError where there is no run, LogVersionError where a newer gradscope wrote it,
    LogError where the folder or its files can't be read.
    """
    folder = Path(log_dir)
    try:
        files = run_files(folder)
    except FileNotFoundError:
        message = f"there is no folder {str(folder)!r}; give watch's log_dir"
        raise NoRunError(message) from None
    except NotADirectoryError:
        message = f"{str(folder)!r} is a file; give the folder that was watch's log_dir"
        raise NoRunError(message) from None
    except OSError as error:
        message = f"{str(folder)!r} can't be read: {error}"
        raise LogError(message) from error
    if not files:
        message = f"{str(folder)!r} holds no gradscope run{_near(folder)}"
        raise NoRunError(message)
    return _run(folder, _collect(files))


def continuation(log_dir: Path) -> Continuation | None:
    """Where the run in the folder stands; None where there is none, or none with a beginning.

    Raises LogVersionError where a newer gradscope wrote it, LogError where it can't be read or
    has other quantities than this version writes.
    """
    found = _collect(run_files(log_dir))
    if found.header is None:
        return None
    if found.header["quantities"] != known_quantities():
        message = (
            f"the run in {str(log_dir)!r} has other quantities than this version of gradscope "
            "writes, and can't be resumed; leave resume out to start a new run beside it"
        )
        raise LogError(message)
    run = _run(log_dir, found)
    entities = {}
    for table, known in found.entities.items():
        # Columns may have lost their names to damage, but not their numbers.
        widths = (row.shape[1] for row in found.tables[table].values())
        columns = max([0, *widths, *(column + 1 for column in known)])
        entities[table] = tuple(known.get(column) for column in range(columns))
    step = int(run.steps[-1]) + 1 if len(run.steps) else 0
    return Continuation(step, found.sequence, entities, run.meta, found.coverage)


def empty_run(meta: Mapping[str, Any]) -> Run:
    """A run of which nothing could be read."""
    header = {
        "format_version": schema.FORMAT_VERSION,
        "quantities": known_quantities(),
        "meta": meta,
    }
    return _run(None, _Collected(header))


def _near(folder: Path) -> str:
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir() and run_files(path))
    return f"; its folders {', '.join(runs[:5])} do" if runs else ""


def _collect(files: Sequence[Path]) -> _Collected:
    """The run that the last file with a header begins, and that the files behind it continue."""
    found = _Collected()
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            message = f"{str(path)!r} can't be read: {error}"
            raise LogError(message) from error
        leftover = framing.Leftover()
        records = framing.records(content, leftover)
        beginning = list(islice(records, _BEGINNING))
        tags = set(_tags(beginning))
        if schema.HEADER in tags:
            found = _Collected()
        elif schema.RESUMED not in tags or found.header is None:
            # Of which run it is can't be told.
            found.left_out.append(f"{path.name}: it has no readable beginning")
            continue
        _sort_all(found, chain(beginning, records), leftover, path)
    return found


# The version, then the header or what stands in its place.
_BEGINNING = 2


def _tags(records: Iterable[bytes]) -> Iterator[str]:
    for record in records:
        with suppress(DecodeError):
            yield from (value.tag for value in event_pb2.Event.FromString(record).summary.value)


def _sort_all(
    found: _Collected, records: Iterable[bytes], leftover: framing.Leftover, path: Path
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


def _sort_in(found: _Collected, record: bytes, path: Path) -> None:
    try:
        event = event_pb2.Event.FromString(record)
        for value in event.summary.value:
            _take(found, event.step, value, path)
    except _FOREIGN as error:
        found.left_out.append(f"a record of {path.name} that is not understood: {error!r}")


def _take(found: _Collected, step: int, value: schema.Value, path: Path) -> None:
    table = _TABLE_OF_TAG.get(value.tag)
    if table is not None:
        if found.header is None:
            message = f"{table} before the header"
            raise ValueError(message)
        quantities = len(found.header["quantities"][table])
        found.tables[table][step] = schema.read_table(value, quantities)
    elif value.tag in _MAGNITUDES_OF_TAG:
        _take_counts(found, step, value)
    elif value.tag == schema.PULSE:
        columns, rows = schema.read_pulse(value)
        if columns[:1] != ["step"] or rows.shape[1:] != (len(columns),):
            message = f"a pulse of shape {rows.shape} with columns {columns}"
            raise ValueError(message)
        found.pulses.append((columns, rows))
    elif value.tag in schema.NUMBERED:
        found.sequence = max(found.sequence, step)
        _take_json(found, value.tag, schema.read_json(value), path)


def _take_json(found: _Collected, tag: str, content: dict[str, Any], path: Path) -> None:
    if tag == schema.ENTITIES:
        for column, entry in enumerate(content["entities"], start=content["first"]):
            entity = Entity(**{**entry, "shape": tuple(entry["shape"])})
            found.entities[content["table"]][column] = entity
    elif tag == schema.COVERAGE:
        found.coverage = content
    elif tag == schema.PROBLEM:
        # Resumed, a run meets the same limits again.
        if all(content["message"] != earlier["message"] for earlier in found.problems):
            found.problems.append(content)
    elif tag == schema.RESUMED:
        found.resumed.append(int(content["step"]))
    else:
        found.header = _header(content, path)


def _take_counts(found: _Collected, step: int, value: schema.Value) -> None:
    """The counts of a step if they are whole, in the bins of the run."""
    lowest, bins, packed = schema.read_counts(value)
    unpack_counts(packed, bins)
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


def _run(folder: Path | None, found: _Collected) -> Run:
    if found.header is None:
        message = f"the run in {str(folder)!r} has no readable beginning; nothing can be read"
        raise LogError(message)
    quantities: dict[TableName, list[str]] = found.header["quantities"]
    tables = {
        name: _table(name, found.entities[name], quantities[name], found.tables[name])
        for name in CATALOGUE
    }
    steps, scalars = _scalars(found.pulses, tables["parameters"])
    meta = dict(found.header["meta"])
    meta["log_dir"] = None if folder is None else str(folder)
    meta["format_version"] = found.header["format_version"]
    meta["resumed"] = sorted(set(found.resumed))
    meta["coverage"] = found.coverage
    meta["problems"] = found.problems
    meta["left_out"] = found.left_out
    return Run(
        parameters=tables["parameters"],
        modules=tables["modules"],
        signals=tables["signals"],
        steps=steps,
        scalars=scalars,
        meta=meta,
        histograms=_histograms(found, "grad"),
        deep={of: _histograms(found, of) for of in MAGNITUDES if of != "grad" and found.counts[of]},
    )


def _table(
    table: TableName,
    entities: dict[int, Entity],
    quantities: Sequence[str],
    rows: dict[int, NDArray[np.float32]],
) -> Table:
    steps = sorted(rows)
    # An earlier version did not measure what has come since.
    new = [q.name for q in CATALOGUE[table] if q.name not in quantities]
    shape = (len(quantities) + len(new), len(steps), len(entities))
    values = np.full(shape, np.nan, np.float32)
    columns = np.array(sorted(entities), np.int64)
    whole = columns.size == 0 or columns[-1] == columns.size - 1
    for index, step in enumerate(steps):
        row = rows[step]
        # Usually all columns are known, and the earlier ones exist.
        named = columns[columns < row.shape[1]]
        known = row[:, : named.size] if whole else row[:, named]
        # Those that came later were not measured yet.
        values[: len(quantities), index, : named.size] = known
    return Table(
        tuple(entities[column] for column in sorted(entities)),
        np.array(steps, np.int64),
        (*quantities, *new),
        values,
    )


def _histograms(found: _Collected, of: Magnitudes) -> Histograms:
    counted = found.counts[of]
    if found.bins is None or not counted:
        return no_histograms()
    lowest, bins = found.bins
    known = found.entities[MAGNITUDES[of]]
    rows = sorted(known)
    steps = sorted(counted)
    packed = [counted[step] for step in steps]
    if rows != list(range(len(rows))):
        # A lost record of entities must not shift the names of later rows.
        packed = [_named_rows(counts, bins, rows) for counts in packed]
    return Histograms(
        tuple(known[row] for row in rows), np.array(steps, np.int64), lowest, bins, tuple(packed)
    )


def _named_rows(packed: bytes, bins: int, rows: Sequence[int]) -> bytes:
    counts = unpack_counts(packed, bins)
    return pack_counts(counts[[row for row in rows if row < len(counts)]])


def _scalars(
    pulses: list[tuple[list[str], NDArray[np.float64]]], parameters: Table
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.floating[Any]]]]:
    """The scalars aligned to all steps; of a step that was written twice the later value counts."""
    seen: list[NDArray[np.float64]] = [rows[:, 0] for _, rows in pulses]
    steps = np.unique(np.concatenate([*seen, parameters.steps])).astype(np.int64)
    # These are always there, so that nobody has to ask whether a loss was seen.
    scalars = {
        name: np.full(len(steps), np.nan)
        for name in ("loss", "loss_nonfinite", "learning_rate", "grad_norm")
    }
    for columns, rows in pulses:
        at = np.searchsorted(steps, rows[:, 0])
        for column, name in enumerate(columns[1:], start=1):
            values = scalars.setdefault(name, np.full(len(steps), np.nan))
            known = ~np.isnan(rows[:, column])
            values[at[known]] = rows[known, column]
    _add_global_norm(steps, scalars, parameters)
    return steps, dict(scalars)


def _add_global_norm(
    steps: NDArray[np.int64], scalars: dict[str, NDArray[np.float64]], parameters: Table
) -> None:
    """The 2-norm over all parameters and the non-finite flag, where the tables know them."""
    at = np.searchsorted(steps, parameters.steps)
    norms = parameters["grad_norm"].astype(np.float64)
    read = ~np.isnan(norms).all(axis=1)
    nonfinite = (np.nan_to_num(parameters["grad_nonfinite"]) > 0).any(axis=1)
    # The norm of what is left beside NaN is not the gradient's.
    read &= ~nonfinite
    scalars["grad_norm"][at[read]] = np.sqrt(np.nansum(norms[read] ** 2, axis=1))
    # A mean over micro-batches or optimizers: any is enough.
    for flag in {"loss_nonfinite", "skipped", "clipped"} & scalars.keys():
        scalars[flag] = np.sign(scalars[flag])
    # What a GradScaler skips is not given to the optimizer.
    if "skipped" in scalars:
        nonfinite &= ~(scalars["skipped"][at] > 0)
    scalars["nonfinite"] = scalars["loss_nonfinite"].copy()
    scalars["nonfinite"][at] = np.fmax(scalars["nonfinite"][at], nonfinite)
