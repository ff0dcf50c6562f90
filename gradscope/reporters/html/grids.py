"""Layers × steps as the page draws them: heatmaps, and the gradient along the depth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report
from gradscope.analysis.robust import Bools
from gradscope.quantities import TableName
from gradscope.record import Entity, FloatArray, Run, Table
from gradscope.reporters.figures.depth import layers_with_weights
from gradscope.reporters.figures.labels import MANY_ROWS, major_rows, marked_rows
from gradscope.reporters.html.arrays import columns, packed, quantiles
from gradscope.reporters.wording import inert

# The first heatmap is what people look at; the others share the rest of the numbers.
_FIRST = 5 / 7
_MAX_ROWS = 1_000
_MAX_COLUMNS = 2_000
_STEP_BAND = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Subject:
    """A quantity that has a heatmap."""

    title: str
    table: TableName
    quantity: str
    symbol: str
    broken: str | None = None
    log: bool = True


SUBJECTS = (
    Subject("gradient norm", "parameters", "grad_norm", "‖g‖", "grad_nonfinite"),
    Subject(
        "gradient norm at outputs",
        "modules",
        "output_grad_norm",
        "‖∂L/∂y‖",
        "output_grad_nonfinite",
    ),
    # What a gradient that is not finite does to its weight is no change of any size.
    Subject("update ratio", "parameters", "update_ratio", "‖Δw‖/‖w‖", "grad_nonfinite"),
    Subject("output rms", "modules", "output_rms", "rms(y)", "output_nonfinite"),
    Subject("dead units", "modules", "dead_unit_fraction", "dead", log=False),
    Subject("saturated outputs", "modules", "output_saturated_fraction", "saturated", log=False),
)


def heatmaps(report: Report, budget: int) -> Iterator[dict[str, Any]]:
    """The first gets most of the budget, the others share the rest."""
    run = report.run
    shown = [subject for subject in SUBJECTS if _is_known(run, subject)]
    for subject in shown:
        table = _table(run, subject.table)
        rows = _chosen_rows(table, report.findings, subject)
        share = _FIRST if subject is shown[0] else (1 - _FIRST) / (len(shown) - 1)
        most = min(_MAX_COLUMNS, max(50, int(budget * share) // max(1, len(rows))))
        yield _grid(report, subject, rows, most)


def _is_known(run: Run, subject: Subject) -> bool:
    table = _table(run, subject.table)
    if subject.quantity not in table or not len(table.steps) or not table.entities:
        return False
    return bool((~np.isnan(table[subject.quantity])).any() or broken_in(table, subject).any())


def _grid(report: Report, subject: Subject, rows: list[int], most: int) -> dict[str, Any]:
    table = _table(report.run, subject.table)
    values = table[subject.quantity][:, rows]
    shown = columns(values, broken_in(table, subject)[:, rows], table.steps, most, log=subject.log)
    entities = [table.entities[row] for row in rows]
    left_out = len(table.entities) - len(rows)
    return {
        "title": subject.title,
        "table": subject.table,
        "symbol": subject.symbol,
        "log": subject.log,
        "rows": [inert(entity.name) for entity in entities],
        "left_out": left_out,
        "pooled": len(shown.first) < len(table.steps),
        "steps": shown.first.tolist(),
        "ends": shown.last.tolist(),
        "values": packed(shown.values),
        "marks": _marks(entities, report),
    }


def _table(run: Run, name: TableName) -> Table:
    table: Table = getattr(run, name)
    return table


def broken_in(table: Table, subject: Subject) -> Bools:
    """Where (steps × entities) there was NaN or infinity, as far as the subject counts it."""
    if subject.broken is None or subject.broken not in table:
        return np.zeros(table[subject.quantity].shape, dtype=bool)
    flags: Bools = table[subject.broken] > 0
    return flags


def _chosen_rows(table: Table, findings: Sequence[Finding], subject: Subject) -> list[int]:
    """The entities that were measured, in the order of depth; where too many, the telling ones."""
    measured = ~np.isnan(table[subject.quantity]).all(axis=0) | broken_in(table, subject).any(
        axis=0
    )
    order = sorted(np.flatnonzero(measured).tolist(), key=lambda row: table.entities[row].depth)
    marked = set(marked_rows(table.entities, findings))
    if subject.table == "parameters" and len(order) > MANY_ROWS:
        order = major_rows(table.entities, order)
    if len(order) <= _MAX_ROWS:
        return order
    found = [row for row in order if row in marked][: _MAX_ROWS // 2]
    stride = -(-len(order) // (_MAX_ROWS - len(found)))
    kept = set(found) | set(order[::stride])
    return [row for row in order if row in kept]


def _marks(entities: Sequence[Entity], report: Report) -> list[dict[str, Any]]:
    """The rows and steps of warnings and errors."""
    made = []
    steps = report.run.recorded_steps
    for finding in report.findings:
        if finding.severity is Severity.INFO:
            continue
        begin, end = finding.span or (int(steps[0]), int(steps[-1]))
        made += [
            {"row": row, "first": begin, "last": end, "text": f"{finding.code} {finding.name}"}
            for row in marked_rows(entities, [finding])
        ]
    return made


def profile(report: Report, budget: int) -> dict[str, Any] | None:
    """The gradient at the outputs of the layers that have weights, else that of the weights."""
    run = report.run
    weights = [row for row, e in enumerate(run.parameters.entities) if e.group == "weight"]
    everything = range(len(run.parameters.entities))
    for subject, wanted in (
        (SUBJECTS[1], layers_with_weights(run)),
        (SUBJECTS[0], weights),
        (SUBJECTS[0], everything),
    ):
        if not _is_known(run, subject):
            continue
        chosen = set(wanted)
        listed = _chosen_rows(_table(run, subject.table), report.findings, subject)
        rows = [row for row in listed if row in chosen]
        if rows:
            most = min(_MAX_COLUMNS, max(50, budget // len(rows)))
            grid = _grid(report, subject, rows, most)
            return {**grid, "bands": packed(_over_steps(run, subject, rows))}
    return None


def _over_steps(run: Run, subject: Subject, rows: list[int]) -> FloatArray:
    """Quantiles and median of each row over all its steps (rows × 3): columns hold extremes."""
    table = _table(run, subject.table)
    values = table[subject.quantity][:, rows].astype(np.float64)
    values[broken_in(table, subject)[:, rows] | np.isinf(values)] = np.nan
    return np.stack(quantiles(values.T, _STEP_BAND), axis=1)
