"""Curves over the steps as the page draws them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.analysis.finding import Severity
from gradscope.analysis.report import Report
from gradscope.analysis.robust import Bools
from gradscope.record import FloatArray, Run, StepArray
from gradscope.reporters.html.arrays import packed, quantiles
from gradscope.reporters.html.grids import SUBJECTS, Subject, broken_in

_MAX_POINTS = 4_000
_LAYER_BAND = (0.05, 0.5, 0.95)


def charts(report: Report) -> Iterator[dict[str, Any]]:
    """Loss, gradient norm and update ratio by step."""
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
    yield from _spread_chart("Gradient norm", SUBJECTS[0], known, run, marks)
    yield from _spread_chart("Update ratio", SUBJECTS[2], [], run, marks)


def _spread_chart(
    title: str,
    subject: Subject,
    more: list[dict[str, Any]],
    run: Run,
    marks: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The median and the spread over the layers; a step at which any is broken is marked."""
    table = run.parameters
    values = table[subject.quantity].astype(np.float64)
    broken = broken_in(table, subject) | np.isinf(values)
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
        if finding.severity is Severity.INFO or finding.span is None:
            continue
        first, last = finding.span
        if first > run.recorded_steps[0] or last < run.recorded_steps[-1]:
            text = f"{finding.code} {finding.name}"
            made.append({"first": first, "last": last, "text": text})
    return made[:20]
