"""The picture of how far each step moves each layer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.analysis.words import count
from gradscope.record import FloatArray, Run, StepArray
from gradscope.reporters.figures.brackets import draw_lanes, lanes_of_steps, room_for
from gradscope.reporters.figures.canvas import (
    blank,
    canvas,
    figure_of,
    legend,
    level_lines,
    size,
    step_axis,
    titled,
)
from gradscope.reporters.figures.labels import elided, major_rows, marked_rows
from gradscope.reporters.figures.raster import interrupted, logarithm, row_medians, spaced
from gradscope.reporters.figures.theme import LIGHT, Theme

# Where layers that learn lie: log10(‖Δw‖/‖w‖) of 60 faulty and 39 healthy small trainings; left
# by faults, and by healthy ones during warm-up and when they have converged.
_HEALTHY = (-4.0, -1.0)
# The usual value (Karpathy, makemore 3; cs231n, "somewhere around 1e-3").
_USUAL = -3.0
_BAND = (5, 50, 95)
# More lines than this can't be told apart.
MAX_NAMED = 4
_STYLES = ("-", "--", "-.", ":")
_NAME_LENGTH = 30
# A single outlier of float32 must not press all others flat.
_MAX_DECADES = 16
_LINE_HEIGHT = 0.15  # inches
_NEAR_THE_END = 0.75
_NAME_OFFSET = 0.025  # of the axes' width
_BOTTOM, _TOP = 0.03, 0.97

F64 = NDArray[np.float64]


def update_ratio(
    run: Run, *, ax: Axes | None = None, theme: Theme = LIGHT, findings: Sequence[Finding] = ()
) -> Figure:
    """How far each step moves the layers, relative to their size: ‖Δw‖/‖w‖ over the steps.

    The median and the 5th to 95th percentile of the layers (biases and norms are left out: they
    start at zero), and by name up to four: those with a warning or an error among `findings`,
    then those farthest outside the shaded range, in which most layers that learn lie. A layer
    below it may have converged or be warming up.
    """
    if not len(run.recorded_steps):
        return blank("Nothing was recorded.", theme, ax)
    table = run.parameters
    rows = major_rows(table.entities, range(len(table.entities)))
    ratios = table["update_ratio"][:, rows]
    if np.isnan(ratios).all():
        return blank("No update was measured.", theme, ax)

    entities = [table.entities[row] for row in rows]
    logarithms = logarithm(ratios)
    steps, curves = interrupted(table.steps, logarithms)
    named = _named(logarithms, marked_rows(entities, findings))
    lanes = lanes_of_steps(findings)
    with canvas(ax, 3.8, theme, room_for(lanes)) as axes:
        axes.set_yscale("log")
        step_axis(axes, table.steps)
        axes.set_ylim(*_limits(logarithms, zeros=bool((ratios == 0).any())))
        _guide(axes, theme)
        if len(named) < len(entities):
            _draw_layers(axes, steps, curves, theme)
        names = [elided(entities[row].name, _NAME_LENGTH) for row in named]
        _draw_named(axes, steps, curves[:, named], names, theme)
        _mark(axes, table.steps, ratios, theme)
        axes.set_ylabel("‖Δw‖ / ‖w‖")
        draw_lanes(axes, lanes, theme)
        titled(axes, "Size of each update relative to the weights", room_for(lanes))
        level_lines(axes, theme)
        legend(axes, own=ax is None, over=False)
    return figure_of(axes)


def _named(logarithms: F64, marked: Sequence[int]) -> list[int]:
    """The layers with a line of their own; all where they are few."""
    typical = row_medians(logarithms)
    drawn = np.flatnonzero(np.isfinite(typical)).tolist()
    if len(drawn) <= MAX_NAMED:
        return drawn
    outside = np.maximum(_HEALTHY[0] - typical, typical - _HEALTHY[1])
    worst = sorted(drawn, key=lambda row: (row not in marked, -outside[row]))
    return [row for row in worst if row in marked or outside[row] > 0][:MAX_NAMED]


def _limits(logarithms: F64, *, zeros: bool) -> tuple[float, float]:
    """Of the vertical axis, with room for the marks of zeros."""
    known = logarithms[np.isfinite(logarithms)]
    if not known.size:
        known = np.array(_HEALTHY)
    high = max(float(known.max()), _HEALTHY[1])
    low = max(min(float(known.min()), _HEALTHY[0]), high - _MAX_DECADES)
    margin = 0.04 * (high - low)
    return 10 ** (low - margin - 2 * margin * zeros), 10 ** (high + margin)


def _guide(axes: Axes, theme: Theme) -> None:
    low, high = (10**power for power in _HEALTHY)
    axes.axhspan(
        low, high, fc=theme.grid, alpha=0.7, lw=0, zorder=0, label="where most layers learn"
    )
    axes.axhline(10**_USUAL, c=theme.muted, lw=0.8, ls=(0, (1, 2)), zorder=1, label="usual, 1e-3")


def _draw_layers(axes: Axes, steps: F64, logarithms: F64, theme: Theme) -> None:
    known = [row[np.isfinite(row)] for row in logarithms]
    found = np.array(
        [np.percentile(row, _BAND) if row.size else np.full(len(_BAND), np.nan) for row in known]
    )
    low, median, high = 10**found.T
    axes.fill_between(
        steps, low, high, color=theme.line, alpha=0.2, lw=0, label="90 % of the layers"
    )
    axes.plot(steps, median, c=theme.line, lw=2, label="median layer", **_dots(median))


def _draw_named(
    axes: Axes, steps: F64, logarithms: F64, names: Sequence[str], theme: Theme
) -> None:
    """Lines with their names at the right, one below the other where they would collide."""
    colors = (theme.last, theme.first, theme.ink, theme.muted)
    ends = [np.flatnonzero(np.isfinite(column))[-1] for column in logarithms.T]
    tips = [(float(steps[end]), 10 ** logarithms[end, row]) for row, end in enumerate(ends)]
    to_axes = axes.transScale + axes.transLimits
    spots = [to_axes.transform(tip) for tip in tips]
    heights = _apart([float(spot[1]) for spot in spots], _LINE_HEIGHT / size(axes)[1])
    for row, name in enumerate(names):
        # A line that ends early has its name there, not across the others.
        beside = 1.0 if spots[row][0] > _NEAR_THE_END else float(spots[row][0])
        color, place = colors[row], (beside + _NAME_OFFSET, heights[row])
        line = 10 ** logarithms[:, row]
        axes.plot(steps, line, _STYLES[row], c=color, lw=1.2, label=f"_{name}", **_dots(line))
        axes.annotate(
            name, tips[row], place, textcoords="axes fraction", va="center",
            fontsize=8, color=color, parse_math=False, usetex=False, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "lw": 0.7, "color": color, "shrinkB": 0, "relpos": (0, 0.5)
            },
        )  # fmt: skip


def _dots(line: F64) -> dict[str, Any]:
    """Points without neighbours, through which no line shows."""
    known = np.pad(np.isfinite(line), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    return {"marker": "o", "ms": 3, "markevery": np.flatnonzero(alone).tolist()}


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved as little as keeps their order and this gap between them."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    places = list(heights)
    for lower, upper in pairwise(order):
        places[upper] = max(places[upper], places[lower] + gap)
    limit = 1.0
    for index in reversed(order):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _mark(axes: Axes, steps: StepArray, ratios: FloatArray, theme: Theme) -> None:
    zeros, infinite = (ratios == 0).sum(axis=1), np.isinf(ratios).sum(axis=1)
    of = count(ratios.shape[1], "layer")
    kinds = (
        (f"exactly zero in up to {zeros.max()} of {of}", zeros, "v", _BOTTOM, theme.ink),
        (f"infinite in up to {infinite.max()} of {of}", infinite, "x", _TOP, theme.nonfinite),
    )
    for label, layers, marker, height, color in kinds:
        at = spaced(steps[layers > 0], steps)
        if len(at):
            axes.scatter(
                at, np.full(len(at), height), transform=axes.get_xaxis_transform(),
                marker=marker, c=color, s=18, lw=1.2, label=label,
            )  # fmt: skip
