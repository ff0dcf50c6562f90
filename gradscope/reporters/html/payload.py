"""What the page's pictures are drawn from: plain values and packed arrays."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.layers import module_of
from gradscope.analysis.report import Report
from gradscope.analysis.robust import Bools, median
from gradscope.quantities import TableName
from gradscope.record import Entity, FloatArray, Run, StepArray, Table
from gradscope.reporters.figures.labels import marked_rows
from gradscope.reporters.html.arrays import columns, compressed, packed
from gradscope.reporters.wording import inert

# The page stays below 3 MB: a number takes about two bytes in it. The first heatmap is what
# people look at; the others share the rest.
_MAX_NUMBERS = 700_000
_FIRST = 5 / 7
_MAX_ROWS = 1_000
_MAX_COLUMNS = 2_000
_MAX_POINTS = 4_000
_MAX_RIDGES, _MAX_RIDGE_STEPS = 64, 40
# With more rows than this biases and norms are left out: they follow their layer's weight.
_MANY_ROWS = 40
_MINOR_GROUPS = frozenset({"bias", "norm"})
_LAYER_GROUPS = frozenset({"linear", "convolution", "recurrent", "attention", "embedding"})
_BAND = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A quantity that has a heatmap."""

    title: str
    table: TableName
    quantity: str
    symbol: str
    broken: str | None = None
    log: bool = True


_SUBJECTS = (
    _Subject("gradient norm", "parameters", "grad_norm", "‖g‖", "grad_nonfinite"),
    _Subject(
        "gradient norm at outputs",
        "modules",
        "output_grad_norm",
        "‖∂L/∂y‖",
        "output_grad_nonfinite",
    ),
    _Subject("update ratio", "parameters", "update_ratio", "‖Δw‖/‖w‖"),
    _Subject("output rms", "modules", "output_rms", "rms(y)", "output_nonfinite"),
    _Subject("dead units", "modules", "dead_unit_fraction", "dead", log=False),
    _Subject("saturated outputs", "modules", "output_saturated_fraction", "saturated", log=False),
)


def payload(report: Report, name: str, share: int = 1) -> dict[str, Any]:
    """Everything that is drawn of one run; `share`: how many runs share the page."""
    run = report.run
    return {
        "name": inert(name),
        "heatmaps": list(_heatmaps(report, _MAX_NUMBERS // share)),
        "profile": _profile(report, _MAX_NUMBERS // share // 8),
        "charts": list(_charts(report)) if len(run.steps) else [],
        "spread": _spread(report),
        "layers": _layers(report),
    }


def _heatmaps(report: Report, budget: int) -> Iterator[dict[str, Any]]:
    """The first gets most of the budget, the others share the rest."""
    run = report.run
    shown = [subject for subject in _SUBJECTS if _is_known(run, subject)]
    for subject in shown:
        table = _table(run, subject.table)
        rows = _chosen_rows(table, report.findings, subject)
        share = _FIRST if subject is shown[0] else (1 - _FIRST) / (len(shown) - 1)
        most = min(_MAX_COLUMNS, max(50, int(budget * share) // max(1, len(rows))))
        yield _grid(report, subject, rows, most)


def _is_known(run: Run, subject: _Subject) -> bool:
    table = _table(run, subject.table)
    if subject.quantity not in table or not len(table.steps) or not table.entities:
        return False
    return bool((~np.isnan(table[subject.quantity])).any() or _broken(table, subject).any())


def _grid(report: Report, subject: _Subject, rows: list[int], most: int) -> dict[str, Any]:
    table = _table(report.run, subject.table)
    values = table[subject.quantity][:, rows]
    shown = columns(values, _broken(table, subject)[:, rows], table.steps, most, log=subject.log)
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


def _broken(table: Table, subject: _Subject) -> Bools:
    if subject.broken is None or subject.broken not in table:
        return np.zeros(table[subject.quantity].shape, dtype=bool)
    flags: Bools = table[subject.broken] > 0
    return flags


def _chosen_rows(table: Table, findings: Sequence[Finding], subject: _Subject) -> list[int]:
    """The entities that were measured, in the order of depth; where too many, the telling ones."""
    measured = ~np.isnan(table[subject.quantity]).all(axis=0) | _broken(table, subject).any(axis=0)
    order = sorted(np.flatnonzero(measured).tolist(), key=lambda row: table.entities[row].depth)
    marked = set(marked_rows(table.entities, findings))
    if subject.table == "parameters" and len(order) > _MANY_ROWS:
        major = [row for row in order if table.entities[row].group not in _MINOR_GROUPS]
        order = major or order
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
        begin = min((e.first_step for e in finding.evidence), default=int(steps[0]))
        end = max((e.last_step for e in finding.evidence), default=int(steps[-1]))
        made += [
            {"row": row, "first": begin, "last": end, "text": f"{finding.code} {finding.name}"}
            for row in marked_rows(entities, [finding])
        ]
    return made


def _profile(report: Report, budget: int) -> dict[str, Any] | None:
    """The gradient at the outputs of the layers that have weights, else that of the weights."""
    run = report.run
    for subject, groups in (
        (_SUBJECTS[1], _LAYER_GROUPS),
        (_SUBJECTS[0], frozenset({"weight"})),
        (_SUBJECTS[0], None),
    ):
        if not _is_known(run, subject):
            continue
        rows = _chosen_rows(_table(run, subject.table), report.findings, subject)
        entities = _table(run, subject.table).entities
        rows = [row for row in rows if groups is None or entities[row].group in groups]
        if rows:
            most = min(_MAX_COLUMNS, max(50, budget // len(rows)))
            return _grid(report, subject, rows, most)
    return None


def _charts(report: Report) -> Iterator[dict[str, Any]]:
    run = report.run
    table = run.parameters
    marks = _step_marks(report)
    loss = run.scalars.get("loss")
    if loss is not None and (np.isfinite(loss).any() or np.isinf(loss).any()):
        flagged = run.scalars.get("loss_nonfinite", np.zeros(len(loss))) > 0
        series = _series("loss", run.steps, loss, np.isinf(loss) | (np.isnan(loss) & flagged))
        yield {"title": "Loss", "series": [series], "band": None, "marks": marks}
    if not len(table.steps):
        return
    norm = run.scalars.get("grad_norm")
    known = [] if norm is None or np.isnan(norm).all() else [_series("all layers", run.steps, norm)]
    yield from _spread_chart("Gradient norm", "grad_norm", known, table, marks)
    yield from _spread_chart("Update ratio", "update_ratio", [], table, marks)


def _spread_chart(
    title: str,
    quantity: str,
    more: list[dict[str, Any]],
    table: Table,
    marks: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    values = table[quantity].astype(np.float64)
    known = np.isfinite(values).any(axis=1)
    if not known.any():
        return
    steps, finite = table.steps[known], values[known]
    low, middle, high = (
        np.nanquantile(np.where(np.isfinite(finite), finite, np.nan), share, axis=1)
        for share in _BAND
    )
    middle_series = _series("median layer", steps, middle)
    band = None
    if values.shape[1] > 1:
        at = _thinned(steps)
        band = {
            "name": "90 % of the layers",
            "steps": steps[at].tolist(),
            "low": packed(low[at]),
            "high": packed(high[at]),
        }
    yield {"title": title, "series": [middle_series, *more], "band": band, "marks": marks}


def _series(
    name: str, steps: StepArray, values: FloatArray, broken: Bools | None = None
) -> dict[str, Any]:
    flags = np.isinf(values) if broken is None else broken
    known = np.isfinite(values)
    shown, numbers = _most_telling(steps[known], values[known])
    at = steps[flags]
    return {
        "name": name,
        "steps": shown.tolist(),
        "values": packed(numbers),
        "broken": at[_thinned(at, 200)].tolist(),
    }


def _most_telling(steps: StepArray, values: FloatArray) -> tuple[StepArray, FloatArray]:
    """At most so many points: of each stretch of steps the lowest and the highest."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    size = -(-2 * len(steps) // _MAX_POINTS)
    starts = range(0, len(steps), size)
    kept = {0, len(steps) - 1}
    for start in starts:
        part = values[start : start + size]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    at = sorted(kept)
    return steps[at], values[at]


def _thinned(steps: StepArray, most: int = _MAX_POINTS) -> slice:
    return slice(None, None, max(1, -(-len(steps) // most)))


def _step_marks(report: Report) -> list[dict[str, Any]]:
    """The steps of the root causes that do not hold for the whole run."""
    run = report.run
    made = []
    for finding in report.roots:
        if finding.severity is Severity.INFO or not finding.evidence:
            continue
        first = min(evidence.first_step for evidence in finding.evidence)
        last = max(evidence.last_step for evidence in finding.evidence)
        if first > run.recorded_steps[0] or last < run.recorded_steps[-1]:
            text = f"{finding.code} {finding.name}"
            made.append({"first": first, "last": last, "text": text})
    return made[:20]


def _spread(report: Report) -> dict[str, Any] | None:
    """The histograms of the weights, at a few steps."""
    histograms = report.run.histograms
    if not histograms:
        return None
    marked = set(marked_rows(histograms.entities, report.findings))
    weights = [row for row, e in enumerate(histograms.entities) if e.group not in _MINOR_GROUPS]
    rows = sorted(weights, key=lambda row: histograms.entities[row].depth)
    if len(rows) > _MAX_RIDGES:
        stride = -(-len(rows) // (_MAX_RIDGES // 2))
        found = [row for row in rows if row in marked][: _MAX_RIDGES // 2]
        kept = set(found) | set(rows[::stride])
        rows = [row for row in rows if row in kept]
    chosen = np.unique(
        np.linspace(0, len(histograms.steps) - 1, min(len(histograms.steps), _MAX_RIDGE_STEPS))
        .round()
        .astype(int)
    )
    counts = np.stack([histograms.at(int(index))[rows] for index in chosen], axis=1)
    rows, counts = _with_entries(rows, counts)
    if not rows:
        return None
    used = np.flatnonzero(counts.any(axis=(0, 1)))
    first, last = max(0, int(used[0]) - 1), min(histograms.bins, int(used[-1]) + 2)
    total = np.maximum(counts.sum(axis=2, keepdims=True, dtype=np.float64), 1)
    # Of what is not zero; the root keeps small shares visible in a byte.
    roots = np.rint(255 * np.sqrt(counts[:, :, first:last] / total)).astype(np.uint8)
    return {
        "layers": [inert(histograms.entities[row].name) for row in rows],
        "steps": histograms.steps[chosen].tolist(),
        "lowest": histograms.lowest + first,
        "bins": last - first,
        "roots": compressed(roots),
    }


def _with_entries(rows: list[int], counts: Any) -> tuple[list[int], Any]:
    some = counts.any(axis=(1, 2))
    return [row for row, kept in zip(rows, some, strict=True) if kept], counts[some]


def _layers(report: Report) -> list[dict[str, Any]]:
    """The parts of the model with their health, for the tree."""
    run = report.run
    modules = [entity for entity in run.modules.entities if "#" not in entity.name]
    norms = dict(zip(run.modules.names, _medians(run.modules, "output_grad_norm"), strict=True))
    entities: Iterable[Entity] = modules
    if not modules:
        entities = run.parameters.entities
        norms = dict(zip(run.parameters.names, _medians(run.parameters, "grad_norm"), strict=True))
    listed = [entity for entity in entities if not entity.name.startswith("(")]
    listed.sort(key=lambda entity: entity.depth)
    return [
        {
            "name": inert(entity.name),
            "type": inert(entity.type),
            "value": _plain(norms[entity.name]),
            **_health(entity.name, report),
        }
        for entity in listed
    ]


def _medians(table: Table, quantity: str) -> list[float]:
    if not len(table.steps):
        return [math.nan] * len(table.entities)
    values = table[quantity].astype(np.float64)
    return list(map(float, median(np.where(np.isfinite(values), values, np.nan), axis=0)))


def _health(name: str, report: Report) -> dict[str, Any]:
    """The worst finding at the layer or at a parameter of it."""
    found = [
        finding
        for finding in report.findings
        if finding.layer is not None and name in {finding.layer, module_of(finding.layer)}
    ]
    if not found:
        return {"severity": "healthy", "codes": []}
    worst = max(finding.severity for finding in found)
    return {"severity": worst.value, "codes": sorted({finding.code for finding in found})}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
