"""What the page's pictures are drawn from: plain values and packed arrays."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.layers import ROOT, module_of
from gradscope.analysis.report import Report
from gradscope.analysis.robust import Bools, median
from gradscope.quantities import TableName
from gradscope.record import Entity, FloatArray, Run, StepArray, Table
from gradscope.reporters.figures.depth import layers_with_weights
from gradscope.reporters.figures.labels import marked_rows
from gradscope.reporters.html.arrays import columns, compressed, packed, quantiles
from gradscope.reporters.wording import inert

# The page stays below 3 MB: a number takes about two bytes in it. The first heatmap is what
# people look at; the others share the rest.
_MAX_NUMBERS = 700_000
_FIRST = 5 / 7
_MAX_ROWS = 1_000
_MAX_COLUMNS = 2_000
_MAX_POINTS = 4_000
_MAX_RIDGES, _MAX_RIDGE_STEPS = 64, 40
# A share of the entries that would be no pixel high needs no room on the axis.
_VISIBLE = 0.002
# With more rows than this biases and norms are left out: they follow their layer's weight.
_MANY_ROWS = 40
_MINOR_GROUPS = frozenset({"bias", "norm"})
_LAYER_BAND = (0.05, 0.5, 0.95)
_STEP_BAND = (0.1, 0.5, 0.9)


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
    # What a gradient that is not finite does to its weight is no change of any size.
    _Subject("update ratio", "parameters", "update_ratio", "‖Δw‖/‖w‖", "grad_nonfinite"),
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
    weights = [row for row, e in enumerate(run.parameters.entities) if e.group == "weight"]
    everything = range(len(run.parameters.entities))
    for subject, wanted in (
        (_SUBJECTS[1], layers_with_weights(run)),
        (_SUBJECTS[0], weights),
        (_SUBJECTS[0], everything),
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


def _over_steps(run: Run, subject: _Subject, rows: list[int]) -> FloatArray:
    """Quantiles and median of each row over all its steps (rows × 3): columns hold extremes."""
    table = _table(run, subject.table)
    values = table[subject.quantity][:, rows].astype(np.float64)
    values[_broken(table, subject)[:, rows] | np.isinf(values)] = np.nan
    return np.stack(quantiles(values.T, _STEP_BAND), axis=1)


def _charts(report: Report) -> Iterator[dict[str, Any]]:
    run = report.run
    table = run.parameters
    marks = _step_marks(report)
    loss = run.scalars.get("loss")
    if loss is not None and (np.isfinite(loss).any() or np.isinf(loss).any()):
        flagged = run.scalars.get("loss_nonfinite", np.zeros(len(loss))) > 0
        series = _series("loss", run.steps, loss, np.isinf(loss) | (np.isnan(loss) & flagged))
        yield _chart("Loss", [series], None, run, marks)
    if not len(table.steps):
        return
    norm = run.scalars.get("grad_norm")
    known = [] if norm is None or np.isnan(norm).all() else [_series("all layers", run.steps, norm)]
    yield from _spread_chart("Gradient norm", _SUBJECTS[0], known, run, marks)
    yield from _spread_chart("Update ratio", _SUBJECTS[2], [], run, marks)


def _spread_chart(
    title: str,
    subject: _Subject,
    more: list[dict[str, Any]],
    run: Run,
    marks: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The median and the spread over the layers; a step at which any is broken is marked."""
    table = run.parameters
    values = table[subject.quantity].astype(np.float64)
    broken = _broken(table, subject) | np.isinf(values)
    values[broken] = np.nan
    known = ~np.isnan(values).all(axis=1)
    if not known.any():
        return
    low, middle, high = quantiles(values, _LAYER_BAND)
    anywhere = np.asarray(broken.any(axis=1))
    middle_series = _series("median layer", table.steps, middle, anywhere)
    band = None
    if values.shape[1] > 1:
        at = np.flatnonzero(known)[_thinned(int(known.sum()))]
        band = {
            "name": "90 % of the layers",
            "steps": table.steps[at].tolist(),
            "low": packed(low[at]),
            "high": packed(high[at]),
        }
    yield _chart(title, [middle_series, *more], band, run, marks)


def _chart(
    title: str,
    series: list[dict[str, Any]],
    band: dict[str, Any] | None,
    run: Run,
    marks: list[dict[str, Any]],
) -> dict[str, Any]:
    ends = [int(run.steps[0]), int(run.steps[-1])]
    return {"title": title, "series": series, "band": band, "ends": ends, "marks": marks}


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
        "broken": at[_thinned(len(at), 200)].tolist(),
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


def _thinned(size: int, most: int = _MAX_POINTS) -> slice:
    return slice(None, None, max(1, -(-size // most)))


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
    # Of what is not zero.
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True, dtype=np.float64), 1)
    seen = np.flatnonzero((shares >= _VISIBLE).any(axis=(0, 1)))
    first, last = max(0, int(seen[0]) - 1), min(histograms.bins, int(seen[-1]) + 2)
    # The root keeps small shares visible in a byte.
    roots = np.rint(255 * np.sqrt(shares[:, :, first:last])).astype(np.uint8)
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
    """The parts of the model with their health, for the tree; the model itself comes first."""
    run = report.run
    table, quantity = run.modules, "output_grad_norm"
    if not table.entities:
        table, quantity = run.parameters, "grad_norm"
    medians = zip(table.entities, _medians(table, quantity), strict=True)
    # Further uses of a module are the same part of the model.
    listed = [(entity, norm) for entity, norm in medians if "#" not in entity.name]
    listed.sort(key=lambda part: (part[0].name != ROOT, part[0].depth))
    found = _by_layer(report)
    made = [
        {
            "name": inert(entity.name),
            "type": inert(entity.type),
            "value": norm if math.isfinite(norm) else None,
            **_health(found.pop(entity.name, ())),
        }
        for entity, norm in listed
    ]
    # A module that holds others, and is not watched itself, can hold a parameter with a finding.
    rest = [
        {"name": inert(name), "type": "", "value": None, **_health(found[name])} for name in found
    ]
    return made + rest


def _medians(table: Table, quantity: str) -> list[float]:
    if not len(table.steps):
        return [math.nan] * len(table.entities)
    values = table[quantity].astype(np.float64)
    return list(map(float, median(np.where(np.isfinite(values), values, np.nan), axis=0)))


def _by_layer(report: Report) -> dict[str, list[Finding]]:
    """The findings at each part of the model: at one of its uses, or at a parameter of it."""
    run = report.run
    parameters = set(run.parameters.names) if run.modules.entities else set()
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.layer is not None:
            name = finding.layer
            part = module_of(name) if name in parameters else name.partition("#")[0]
            found.setdefault(part, []).append(finding)
    return found


def _health(found: Sequence[Finding]) -> dict[str, Any]:
    """The worst of a part's findings."""
    if not found:
        return {"severity": "healthy", "codes": []}
    worst = max(finding.severity for finding in found)
    return {"severity": worst.value, "codes": sorted({finding.code for finding in found})}
