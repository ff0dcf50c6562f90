"""The picture of every layer's gradient at every step."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradscope.analysis.finding import Finding
from gradscope.record import Entity, Run
from gradscope.reporters.figures.brackets import (
    draw_lanes,
    harmful,
    lanes_of_steps,
    room_for,
    runs,
)
from gradscope.reporters.figures.canvas import (
    blank,
    canvas,
    colorbar,
    figure_of,
    legend,
    size,
    step_axis,
    titled,
)
from gradscope.reporters.figures.labels import (
    MANY_ROWS,
    MARK,
    labelled,
    major_rows,
    marked_rows,
    shown_rows,
)
from gradscope.reporters.figures.raster import (
    Flags,
    Raster,
    columns_of,
    logarithm,
    rasterize,
    row_medians,
)
from gradscope.reporters.figures.theme import LIGHT, Theme

# With more, rows would be thinner than a pixel of a screen.
MAX_ROWS = 400

_ROW_HEIGHT = 0.19  # inches
_MIN_HEIGHT, _MAX_HEIGHT = 1.3, 8.0
_LABELS_PER_INCH = 5.5
_NAME_LENGTH = 36
# Marks closer than this fraction of the picture would run into one another.
_MARKS_ACROSS, _MARKS_PER_INCH = 90, 9
# The frame around a finding leaves this much of its rows free, in inches.
_FRAMED = 0.05


def gradient_heatmap(
    run: Run, *, ax: Axes | None = None, theme: Theme = LIGHT, findings: Sequence[Finding] = ()
) -> Figure:
    """The gradient norm of every parameter at every recorded step, the first layer on top.

    Where there are many parameters, biases and norms are left out; of more than 400 that are left,
    the most unusual of each few neighbours is shown, and the picture says so. Between steps
    that are unusually far apart nothing is painted. Frames show the rows and steps of the
    warnings and errors among `findings`, brackets their steps.
    """
    table = run.parameters
    if not len(table.steps) or not table.entities:
        return blank("Nothing was recorded.", theme, ax)
    rows = heatmap_rows(run, findings)
    entities = [table.entities[row] for row in rows]
    norms, broken = table["grad_norm"][:, rows], table["grad_nonfinite"][:, rows] > 0
    if np.isnan(norms).all() and not broken.any():
        return blank("No gradient was measured.", theme, ax)

    raster = rasterize(norms, broken, columns_of(table.steps))
    inner = min(max(_ROW_HEIGHT * len(rows), _MIN_HEIGHT), _MAX_HEIGHT)
    lanes = lanes_of_steps(findings)
    with canvas(ax, inner + 1.1, theme, room_for(lanes)) as axes:
        height = inner if ax is None else size(axes)[1]
        _paint(axes, raster, theme, own=ax is None)
        entries = _mark(axes, raster, theme, int(height * _MARKS_PER_INCH) + 1)
        _frame(axes, entities, findings, height)
        marked = marked_rows(entities, findings)
        shown = shown_rows(len(rows), marked, max(2, int(height * _LABELS_PER_INCH)))
        labelled(axes.yaxis, entities, shown, marked, _NAME_LENGTH)
        axes.tick_params(axis="y", length=0)
        if marked:
            sign = f"${MARK.strip()}$"
            entries.append(Line2D([], [], ls="", marker=sign, c=theme.ink, label="has a finding"))
        legend(axes, own=ax is None, over=False, handles=entries)
        step_axis(axes)
        draw_lanes(axes, lanes, theme)
        axes.set_ylabel(_choice(run, len(rows)))
        titled(axes, "Gradient norm by layer and step", room_for(lanes))
    return figure_of(axes)


def heatmap_rows(run: Run, findings: Sequence[Finding] = ()) -> list[int]:
    """Which parameters are shown, in the order of depth."""
    ordered = _major(run)
    if len(ordered) <= MAX_ROWS:
        return ordered
    table = run.parameters
    logarithms = logarithm(table["grad_norm"])
    typical = row_medians(logarithms)
    steepest = np.nan_to_num(np.abs(logarithms - typical)).max(axis=0)
    broken: Flags = np.any(table["grad_nonfinite"] > 0, axis=0)
    zero: Flags = np.any(table["grad_norm"] == 0, axis=0)
    marked = set(marked_rows(table.entities, findings))

    def unusual(row: int) -> tuple[bool, bool, bool, float]:
        return row in marked, bool(broken[row]), bool(zero[row]), away[row]

    chosen: list[int] = []
    for start in range(0, len(ordered), _neighbours(len(ordered))):
        neighbours = np.array(ordered[start : start + _neighbours(len(ordered))])
        level = typical[neighbours]
        middle = np.median(level[np.isfinite(level)]) if np.isfinite(level).any() else 0.0
        departures = steepest[neighbours] + np.nan_to_num(np.abs(level - middle))
        away = dict(zip(neighbours.tolist(), departures.tolist(), strict=True))
        chosen.append(max(away, key=unusual))
    return chosen


def _major(run: Run) -> list[int]:
    entities = run.parameters.entities
    ordered = sorted(range(len(entities)), key=lambda row: entities[row].depth)
    return ordered if len(ordered) <= MANY_ROWS else major_rows(entities, ordered)


def _choice(run: Run, shown: int) -> str:
    """What the rows are, where they are not all."""
    total = len(_major(run))
    if shown == total:
        return ""
    return f"{shown:,} of {total:,} layers: of each {_neighbours(total)} the most unusual"


def _neighbours(rows: int) -> int:
    """How many rows share one."""
    return -(-rows // MAX_ROWS)


def _extent(raster: Raster) -> tuple[float, float, float, float]:
    return (raster.columns.left, raster.columns.right, raster.logarithm.shape[0] - 0.5, -0.5)


def _paint(axes: Axes, raster: Raster, theme: Theme, *, own: bool) -> None:
    left, right, bottom, top = _extent(raster)
    # What no image covers was not measured.
    unmeasured = Rectangle(
        (left, top), right - left, bottom - top,
        fill=False, hatch="////", lw=0, ec=theme.hatch, zorder=-2,
    )  # fmt: skip
    axes.add_patch(unmeasured)
    for start, end in raster.columns.empty:
        pause = Rectangle((start, top), end - start, bottom - top, fc=theme.grid, lw=0, zorder=-1)
        pause.set_label("_pause")
        axes.add_patch(pause)
    known = raster.logarithm[np.isfinite(raster.logarithm)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    if high - low < 1:
        # Less than a decade is no difference to paint in full contrast.
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    image = axes.imshow(
        np.ma.masked_invalid(raster.logarithm),
        cmap=colormaps[theme.colormap],
        vmin=low,
        vmax=high,
        extent=_extent(raster),
        aspect="auto",
        interpolation="none",
        label="norm",
    )
    if known.size:
        bar = colorbar(axes, image, own=own)
        bar.locator = MaxNLocator(nbins=6, integer=high - low > 2)  # noqa: PLR2004
        bar.formatter = FuncFormatter(lambda power, _: f"$10^{{{power:g}}}$")
        bar.update_ticks()


def _mark(axes: Axes, raster: Raster, theme: Theme, marks_down: int) -> list[Artist]:
    """Paint and mark what has no place on the colour scale; returns the legend's entries."""
    blackened = raster.zero & np.isnan(raster.logarithm)
    codes = np.where(raster.nonfinite, 1.0, np.where(blackened, 0.0, np.nan))
    axes.imshow(
        np.ma.masked_invalid(codes),
        cmap=ListedColormap([theme.zero, theme.nonfinite]),
        vmin=0,
        vmax=1,
        extent=_extent(raster),
        aspect="auto",
        interpolation="none",
        label="marks",
    )
    entries: list[Artist] = []
    kinds = (
        ("exactly zero", raster.zero & ~raster.nonfinite, "o", "#ffffff"),
        ("NaN or infinite", raster.nonfinite, "x", "#000000"),
    )
    for label, flags, marker, color in kinds:
        if flags.any():
            x, y = _spots(flags, raster, marks_down)
            axes.plot(x, y, marker, ms=3.5, mfc="none", mec=color, mew=0.9, label=label)
            entries.append(_entry(label, marker, color, theme))
    if raster.unmeasured.any():
        entries.append(
            Patch(fc=theme.paper, ec=theme.hatch, hatch="//////", lw=0.5, label="not measured")
        )
    if raster.columns.empty:
        entries.append(Patch(fc=theme.grid, label="no step recorded"))
    axes.set_xlim(raster.columns.left, raster.columns.right)
    axes.set_ylim(raster.logarithm.shape[0] - 0.5, -0.5)
    return entries


def _frame(
    axes: Axes, entities: Sequence[Entity], findings: Sequence[Finding], height: float
) -> None:
    """A frame around the rows and the steps of each warning and error that has a layer."""
    left, right = axes.get_xlim()
    rows_per_inch = len(entities) / height
    room = max(0.0, _FRAMED * rows_per_inch - 1) / 2
    rows: dict[tuple[int, int] | None, set[int]] = {}
    for finding in harmful(findings):
        rows.setdefault(finding.span, set()).update(marked_rows(entities, [finding]))
    for seen, first, last in [(seen, *run) for seen, found in rows.items() for run in runs(found)]:
        start, end = (left, right) if seen is None else (seen[0] - 0.5, seen[1] + 0.5)
        start, end = max(start, left), min(end, right)
        top, bottom = first - 0.5 - room, last + 0.5 + room
        frame = Rectangle(
            (start, top), end - start, bottom - top,
            fill=False, ec="#000000", lw=1, label="_finding", zorder=3,
        )  # fmt: skip
        # Seen on any colour, and on dark paper.
        frame.set_path_effects([Stroke(linewidth=2.4, foreground="#ffffff"), Normal()])
        axes.add_patch(frame)


def _entry(label: str, marker: str, color: str, theme: Theme) -> Artist:
    """A piece of the picture: the mark on the colour that it has there."""
    background = theme.zero if marker == "o" else theme.nonfinite
    return Line2D(
        [], [], color=background, lw=9, solid_capstyle="butt", marker=marker, ms=4,
        mfc="none", mec=color, label=label,
    )  # fmt: skip


def _spots(flags: Flags, raster: Raster, marks_down: int) -> tuple[list[float], list[int]]:
    """Where marks go: at most one in a block of cells, always on a cell that has the flag."""
    rows, columns = flags.shape
    down, across = -(-rows // marks_down), -(-columns // _MARKS_ACROSS)
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    for row, column in np.argwhere(flags).tolist():
        taken.setdefault((row // down, column // across), (row, column))
    left, width = raster.columns.left, raster.columns.width
    x = [left + (column + 0.5) * width for _, column in taken.values()]
    return x, [row for row, _ in taken.values()]
