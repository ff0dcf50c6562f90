"""Reading a run back from its folder, also while it is written and after a kill."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import LogError, NoRunError
from gradscope.log import schema
from gradscope.log.collecting import Collected, Pulses, Rows, collect, size_of
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


def load(log_dir: str | PathLike[str]) -> Run:
    """Read the run that `gradscope.watch(..., log_dir=...)` wrote.

    Works while the run is still being written and after it was killed: what could not be read
    is said in `run.meta["left_out"]`. Neither the model nor torch is needed.

    Raises NoRunError where there is no run, LogVersionError where a newer gradscope wrote it,
    LogError where the folder or its files can't be read.
    """
    return _loaded(Path(log_dir))


# What may be read of a log while it is written: the arrays and what judging them takes are as much
# again three times over.
_MOST = 12_000_000


def load_part(log_dir: Path, most: int | None = None) -> Run:
    """The run; of one of more than so many bytes a part, evenly chosen, which it says."""
    return _loaded(log_dir, _MOST if most is None else most)


def _loaded(folder: Path, most: int | None = None) -> Run:
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
    return _run(folder, collect(files, most))


def continuation(log_dir: Path) -> Continuation | None:
    """Where the run in the folder stands; None where there is none, or none with a beginning.

    Raises LogVersionError where a newer gradscope wrote it, LogError where it can't be read or
    has other quantities than this version writes.
    """
    files = run_files(log_dir)
    found = collect(files, _MOST)
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
        widths = (row.shape[1] for _, row in found.tables[table].values())
        columns = max([0, *widths, *(column + 1 for column in known)])
        entities[table] = tuple(known.get(column) for column in range(columns))
    step = int(run.steps[-1]) + 1 if len(run.steps) else 0
    size = size_of(files)
    return Continuation(step, found.sequence, entities, run.meta, found.coverage, size)


def empty_run(meta: Mapping[str, Any]) -> Run:
    """A run of which nothing could be read."""
    header = {
        "format_version": schema.FORMAT_VERSION,
        "quantities": known_quantities(),
        "meta": meta,
    }
    return _run(None, Collected(header))


def _near(folder: Path) -> str:
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir() and run_files(path))
    return f"; its folders {', '.join(runs[:5])} do" if runs else ""


def _run(folder: Path | None, found: Collected) -> Run:
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
    if found.graph is not None:
        meta["graph"] = found.graph
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
    rows: Mapping[int, Rows],
) -> Table:
    steps = sorted(rows)
    # An earlier version did not measure what has come since.
    new = [q.name for q in CATALOGUE[table] if q.name not in quantities]
    shape = (len(quantities) + len(new), len(steps), len(entities))
    values = np.empty(shape, np.float32)
    columns = np.array(sorted(entities), np.int64)
    whole = columns.size == 0 or columns[-1] == columns.size - 1
    for index, step in enumerate(steps):
        there, row = rows[step]
        # Usually all columns are known, and the earlier ones exist.
        named = columns[columns < row.shape[1]]
        known = row[:, : named.size] if whole else row[:, named]
        # Those that came later were not measured yet.
        values[:, index] = np.nan
        values[there, index, : named.size] = known
    return Table(
        tuple(entities[column] for column in sorted(entities)),
        np.array(steps, np.int64),
        (*quantities, *new),
        values,
    )


def _histograms(found: Collected, of: Magnitudes) -> Histograms:
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
    pulses: Sequence[Pulses], parameters: Table
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.floating[Any]]]]:
    """The scalars aligned to all steps; of a step that was written twice the later value counts."""
    # There are many, of few kinds.
    blocks = [
        (columns, np.concatenate([rows for _, rows in block]))
        for columns, block in groupby(pulses, key=itemgetter(0))
    ]
    seen: list[NDArray[np.float64]] = [rows[:, 0] for _, rows in blocks]
    steps = np.unique(np.concatenate([*seen, parameters.steps])).astype(np.int64)
    # These are always there, so that nobody has to ask whether a loss was seen.
    scalars = {
        name: np.full(len(steps), np.nan)
        for name in ("loss", "loss_nonfinite", "learning_rate", "grad_norm")
    }
    for columns, rows in blocks:
        at = np.searchsorted(steps, rows[:, 0])
        for column, name in enumerate(columns[1:], start=1):
            if name not in scalars:
                scalars[name] = np.full(len(steps), np.nan)
            known = ~np.isnan(rows[:, column])
            # Of several for one step numpy keeps the last.
            scalars[name][at[known]] = rows[known, column]
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
