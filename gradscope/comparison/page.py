"""A comparison as one HTML page that asks for nothing; pictures as SVG, there without a script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from markupsafe import Markup

from gradscope.analysis.words import number, share
from gradscope.comparison.result import F64, LN10, Comparison, Configuration
from gradscope.comparison.table import per_layer
from gradscope.comparison.wording import disagreements, gradient, recommendation, size, verdict
from gradscope.reporters.html.script import digest, script, stylesheet
from gradscope.reporters.templates import template
from gradscope.reporters.wording import inert

# More lines can't be told apart; decades beyond this are all as bad.
_MOST_LINES = 40
_FULL = 6.0
# From here on a cell is so dark that white is read best.
_DEEP = 0.5
# As many letters as there is room for above a column and beside a row of the map.
_OF_COLUMN, _OF_ROW = 12, 22
_WIDTH, _HEIGHT, _LEFT, _FOOT = 900, 340, 56, 34


@dataclass(frozen=True, slots=True)
class _Line:
    path: str
    band: str
    theory: str
    title: str
    kind: str
    place: int


@dataclass(frozen=True, slots=True)
class _Box:
    x: int
    y: int
    title: str
    text: str
    kind: str
    depth: float


def render(comparison: Comparison) -> str:
    """The whole page."""
    css = stylesheet() + _css()
    code = script("compare.js")
    low, high = _range(comparison.configurations)
    page: str = template("html/compare.html").render(
        css=Markup(css),  # noqa: S704  (files of this package)
        policy=(
            f"default-src 'none'; script-src {digest(code)}; style-src {digest(css)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        script=Markup(code),  # noqa: S704  (files of this package)
        comparison=comparison,
        verdict=verdict(comparison),
        size=size(comparison),
        recommendation=recommendation(comparison),
        snippet=_snippet(comparison),
        lines=_lines(comparison, low, high),
        ticks=_ticks(low, high),
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        floor=_HEIGHT - _FOOT,
        maps=_maps(comparison),
        rows=[_row(c, place) for place, c in enumerate(comparison.configurations)],
        remarks=any(c.failure or c.remark for c in comparison.configurations),
        columns=_columns(comparison),
        disagreements=disagreements(comparison),
    )
    return page


def _css() -> str:
    own = resources.files("gradscope.reporters").joinpath("html/compare.css")
    return own.read_text(encoding="utf-8")


def _snippet(comparison: Comparison) -> Markup:
    """The code, whose lines stay lines."""
    tried = comparison.verification
    wanted = comparison.best.failure is None and (tried is None or tried.better)
    lines = comparison.best.snippet.rstrip().split("\n") if wanted else []
    return Markup("\n").join(inert(line) for line in lines)


# The gradient by depth, in decades, at the last layer 0.


def _curve(c: Configuration, of: Callable[[F64], float] = np.nanmean) -> F64:
    logs = np.where(np.isfinite(c.gradient), c.gradient, np.nan)
    if logs.shape[1] < 2:  # noqa: PLR2004
        return np.empty(0)
    relative = (logs - logs[:, -1:]) / LN10
    return np.asarray([np.nan if np.isnan(x).all() else of(x) for x in relative.T])


def _range(configurations: Sequence[Configuration]) -> tuple[float, float]:
    curves = [_curve(c) for c in configurations[:_MOST_LINES]]
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves] or [np.zeros(1)])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    # What has vanished far below the others would flatten them.
    return max(math.floor(low), -20.0), min(max(math.ceil(high), 1.0), 20.0)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    step = max(1, math.ceil((high - low) / 6))
    values = np.arange(math.ceil(low / step) * step, high + 0.5, step)
    return [(_y(v, low, high), f"10{_raised(int(v))}" if v else "1") for v in values]


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _y(value: float, low: float, high: float) -> float:
    share = (min(max(value, low), high) - low) / (high - low)
    return round(8 + (1 - share) * (_HEIGHT - _FOOT - 8), 1)


def _lines(comparison: Comparison, low: float, high: float) -> list[_Line]:
    made = []
    for place, c in reversed([*enumerate(comparison.configurations[:_MOST_LINES])]):
        curve = _curve(c)
        if not len(curve):
            continue
        kind = "failed" if c.failure else "top" if c.tier == 1 else "other"
        theory = band = ""
        every = np.arange(len(curve))
        if c.tier == 1 and len(c.cells) > 1:
            under = _path(every, _curve(c, np.nanmin), len(curve), low, high)
            over = _path(every[::-1], _curve(c, np.nanmax)[::-1], len(curve), low, high)
            band = f"{under}L{over[1:]}Z" if under else ""
        if not math.isnan(c.theory) and c.tier == 1:
            # From the last layer but one on, where the slope is taken.
            places = np.arange(len(curve) - 2, 0, -1)
            steps = (places[0] - places) if len(places) else places
            anchor = curve[-2] if len(curve) > 1 and np.isfinite(curve[-2]) else 0.0
            predicted = anchor + steps * c.theory / (2 * LN10)
            theory = _path(places, predicted, len(curve), low, high)
        title = f"{c.name}: {gradient(c)}"
        path = _path(every, curve, len(curve), low, high)
        made.append(_Line(path, band, theory, title, kind, place))
    return made


def _path(places: np.ndarray, values: np.ndarray, number_of: int, low: float, high: float) -> str:
    points = [
        f"{_LEFT + place / (number_of - 1) * (_WIDTH - _LEFT - 12):.1f} {_y(value, low, high)}"
        for place, value in zip(places, values, strict=True)
        if math.isfinite(value)
    ]
    return "M" + "L".join(points) if points else ""


# The grid, one map per mitigation.


@dataclass(frozen=True, slots=True)
class _Map:
    """rows, columns: names as they are, and as they fit."""

    title: str
    rows: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]
    boxes: tuple[_Box, ...]


def _maps(comparison: Comparison) -> list[_Map]:
    names = [*(c.name for c in comparison.configurations), *comparison.left_out]
    made = []
    for mitigation in dict.fromkeys(name.mitigation for name in names):
        here = [name for name in names if name.mitigation == mitigation]
        rows = tuple(dict.fromkeys(name.initialization for name in here))
        columns = tuple(dict.fromkeys(name.activation for name in here))
        boxes = [
            _box(c, rows, columns)
            for c in comparison.configurations
            if c.name.mitigation == mitigation
        ]
        boxes += [
            _Box(
                columns.index(name.activation),
                rows.index(name.initialization),
                f"{name}: {why}",
                "none",
                "absent",
                0.0,
            )
            for name, why in comparison.left_out.items()
            if name.mitigation == mitigation
        ]
        made.append(
            _Map(
                "" if mitigation == "none" else mitigation,
                tuple((name, _fitting(name, _OF_ROW)) for name in rows),
                tuple((name, _fitting(name, _OF_COLUMN)) for name in columns),
                tuple(boxes),
            )
        )
    return made


def _fitting(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _box(c: Configuration, rows: Sequence[str], columns: Sequence[str]) -> _Box:
    ways = [d for d in (c.mean("decades"), c.mean("time_decades")) if not math.isnan(d)]
    worst = max(ways, key=abs, default=math.nan)
    kind = "failed" if c.failure else "unknown" if math.isnan(worst) else ""
    kind = kind or ("arrives" if c.arrives else "shrinks" if worst < 0 else "grows")
    text = "×" if c.failure else "–" if math.isnan(worst) else f"{worst:+.1f}"
    depth = min(abs(worst) / _FULL, 1.0) if kind in {"shrinks", "grows"} else 0.0
    return _Box(
        columns.index(c.name.activation),
        rows.index(c.name.initialization),
        f"{c.name}, tier {c.tier}: {gradient(c)}",
        text,
        kind + (" top" if c.tier == 1 else "") + (" deep" if depth > _DEEP else ""),
        round(0.08 + 0.8 * depth, 3) if depth else 0.0,
    )


# The table.

_COLUMNS = {
    "growth": "per layer",
    "theory": "theory",
    "decades": "decades",
    "time_decades": "decades over time",
    "drift": "drift of variance",
    "dead": "dead",
    "saturated": "flat",
    "similarity": "cosine of samples",
    "update_ratio": "‖g‖ / ‖w‖",
    "early": "loss, first steps",
    "trained": "loss after",
}
_SHARES = {"dead", "saturated"}


def _value(c: Configuration, column: str) -> float:
    if column == "growth":
        return per_layer(c.growth.mean)
    if column == "theory":
        return per_layer(c.theory)
    return c.mean(column)


def _columns(comparison: Comparison) -> list[str]:
    return [
        title
        for column, title in _COLUMNS.items()
        if any(not math.isnan(_value(c, column)) for c in comparison.configurations)
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    """values: by column, what is written, and what it is sorted by."""

    configuration: Configuration
    place: int
    values: dict[str, tuple[str, str]]


def _row(c: Configuration, place: int) -> _Row:
    values = {}
    for column, title in _COLUMNS.items():
        value = _value(c, column)
        said = share(value) if column in _SHARES else number(value)
        values[title] = ("–", "") if math.isnan(value) else (said, repr(float(value)))
    return _Row(c, place, values)
