"""A small picture of a finding's evidence: a curve, the limit, and where it was seen."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.depth import depth_profile
from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.robust import median
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.words import number
from gradscope.record import Run, Table
from gradscope.reporters.wording import inert

WIDTH, HEIGHT = 280.0, 84.0
_EDGE = 6.0
_MAX_POINTS = 140
# What spans more than this is drawn on a logarithmic scale.
_WIDE = 10
_ALONG_DEPTH = "output_grad_norm, first layer"

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sketch:
    """An SVG's content in units of WIDTH × HEIGHT; `seen` is the (x, width) of the finding."""

    curve: str
    dots: tuple[tuple[float, float], ...]
    broken: tuple[float, ...]
    limit: float | None
    seen: tuple[float, float] | None
    title: str
    left: str
    right: str
    low: str
    high: str


def sketch(finding: Finding, run: Run) -> Sketch | None:
    """The picture of the first evidence that has one; None where none has."""
    for evidence in finding.evidence:
        made = _of(evidence, run)
        if made is not None:
            return made
    return None


def _of(evidence: Evidence, run: Run) -> Sketch | None:
    if evidence.quantity.startswith(_ALONG_DEPTH):
        return _along_depth(run)
    if evidence.entity is None:
        values = run.scalars.get(evidence.quantity)
        steps = run.steps
        flags = run.scalars.get(f"{evidence.quantity}_nonfinite")
    else:
        found = _column(evidence, run)
        if found is None:
            return None
        table, column = found
        values, steps = table[evidence.quantity][:, column], table.steps
        flags = None
    if values is None or not len(steps):
        return None
    numbers = np.asarray(values, np.float64)
    broken = np.isinf(numbers) if flags is None else np.isinf(numbers) | (flags > 0)
    of = f" of {inert(evidence.entity)}" if evidence.entity else ""
    seen = (float(evidence.first_step), float(evidence.last_step))
    return _drawn(
        steps.astype(np.float64),
        numbers,
        broken,
        limit=evidence.limit,
        seen=seen,
        title=f"{inert(evidence.quantity)}{of}",
        ends=(f"step {steps[0]}", f"step {steps[-1]}"),
    )


def _column(evidence: Evidence, run: Run) -> tuple[Table, int] | None:
    for table in (run.parameters, run.modules, run.signals):
        if evidence.quantity in table and evidence.entity in table.names:
            return table, table.names.index(evidence.entity)
    return None


def _along_depth(run: Run) -> Sketch | None:
    try:
        profile = depth_profile(run)
    except UnjudgedError:
        return None
    norms = median(profile.norms, axis=0)
    places = np.arange(len(norms), dtype=np.float64)
    names = [inert(layer.name) for layer in profile.layers]
    return _drawn(
        places,
        norms,
        np.isinf(norms),
        limit=None,
        seen=None,
        title="gradient norm at each layer's output, median step",
        ends=(names[0], names[-1]),
    )


def _drawn(
    x: F64,
    y: F64,
    broken: NDArray[np.bool_],
    *,
    limit: float | None,
    seen: tuple[float, float] | None,
    title: str,
    ends: tuple[str, str],
) -> Sketch | None:
    known = np.isfinite(y) & ~broken
    if not known.any() and not broken.any():
        return None
    shown = y[known]
    reach = shown if limit is None or not np.isfinite(limit) else np.append(shown, limit)
    positive = reach[reach > 0]
    log = bool(positive.size and reach.min() >= 0 and positive.max() > _WIDE * positive.min())
    if log:
        # A zero stands at the foot: it has no place on a logarithmic scale.
        floor = positive.min() / 2
        scale = np.log10(np.maximum(reach, floor))
        heights = np.log10(np.maximum(shown, floor))
    else:
        scale, heights = reach, shown
    low, high = (float(scale.min()), float(scale.max())) if scale.size else (0.0, 1.0)
    spread = high - low or 1.0
    span = float(x[-1] - x[0]) or 1.0

    def across(value: float) -> float:
        return round(_EDGE + (WIDTH - 2 * _EDGE) * (value - float(x[0])) / span, 1)

    def down(value: float) -> float:
        return round(HEIGHT - _EDGE - (HEIGHT - 2 * _EDGE) * (value - low) / spread, 1)

    points = [(across(float(at)), down(float(height))) for at, height in _fewer(x[known], heights)]
    line = None
    if limit is not None and np.isfinite(limit) and (limit > 0 or not log):
        line = down(float(np.log10(limit)) if log else float(limit))
    return Sketch(
        curve="M" + "L".join(f"{px:g} {py:g}" for px, py in points) if len(points) > 1 else "",
        dots=tuple(points) if len(points) <= 24 else (),  # noqa: PLR2004  (more run together)
        broken=tuple(across(float(at)) for at in x[broken][:: max(1, int(broken.sum()) // 20)]),
        limit=line,
        seen=None if seen is None else _shaded(seen, across),
        title=title,
        left=ends[0],
        right=ends[1] if len(x) > 1 else "",
        low=number(float(shown.min())) if shown.size else "",
        high=number(float(shown.max())) if shown.size and shown.max() > shown.min() else "",
    )


def _shaded(seen: tuple[float, float], across: Callable[[float], float]) -> tuple[float, float]:
    """Where the finding was seen, and how wide that is: never so narrow that it can't be seen."""
    left, right = (min(max(across(step), 0.0), WIDTH) for step in seen)
    return max(left - 1.5, 0.0), round(max(right - left + 3, 3.0), 1)


def _fewer(x: F64, y: F64) -> list[tuple[float, float]]:
    """Of each stretch the lowest and the highest, in their order: no one-step event gets lost."""
    size = max(1, -(-2 * len(x) // _MAX_POINTS))
    kept: list[int] = []
    for start in range(0, len(x), size):
        part = y[start : start + size]
        kept += sorted({start + int(part.argmin()), start + int(part.argmax())})
    return [(float(x[at]), float(y[at])) for at in kept]
