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
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradscope.analysis.finding import Finding
from gradscope.record import Entity, Run
from gradscope.reporters.figures.labels import MARK, elided, marked_rows, shown_rows
from gradscope.reporters.figures.raster import Flags, Raster, rasterize
from gradscope.reporters.figures.theme import LIGHT, Theme, blank, drawing, new_figure, step_axis

# With more rows than this, biases and norms are left out: they follow their layer's weight.
_MANY_ROWS = 40
_MINOR_GROUPS = {"bias", "norm"}

_ROW_HEIGHT = 0.19  # inches
_MIN_HEIGHT, _MAX_HEIGHT = 1.3, 8.0
_LABELS_PER_INCH = 5.5
_BAR_WIDTH = 0.17
_NAME_LENGTH = 36
# Marks closer than this fraction of the picture would run into one another.
_MARKS_ACROSS, _MARKS_PER_INCH = 90, 9


def gradient_heatmap(run: Run, *, theme: Theme = LIGHT, findings: Sequence[Finding] = ()) -> Figure:
    """The gradient norm of every parameter at every recorded step, the first layer on top.

    Where there are many parameters, biases and norms are left out. Layers with a warning or an
    error among `findings` are marked.
    """
    table = run.parameters
    if not len(table.steps) or not table.entities:
        return blank("Nothing was recorded.", theme)
    rows = heatmap_rows(run)
    entities = [table.entities[row] for row in rows]
    norms, broken = table["grad_norm"][:, rows], table["grad_nonfinite"][:, rows] > 0
    if np.isnan(norms).all() and not broken.any():
        return blank("No gradient was measured.", theme)

    raster = rasterize(norms, broken, table.steps)
    inner = min(max(_ROW_HEIGHT * len(rows), _MIN_HEIGHT), _MAX_HEIGHT)
    with drawing(theme):
        figure, axes = new_figure(inner + 1.1)
        _paint(figure, axes, raster, inner, theme)
        marks = _mark(axes, raster, theme, int(inner * _MARKS_PER_INCH))
        marked = marked_rows(entities, findings)
        _name_rows(axes, entities, marked, int(inner * _LABELS_PER_INCH), theme)
        if marked:
            marks.append(Line2D([], [], ls="", marker="$▸$", c=theme.ink, label="has a finding"))
        if marks:
            figure.legend(handles=marks, loc="outside lower left", ncols=len(marks))
        axes.set_title("Gradient norm of each layer at each step")
        step_axis(axes)
    return figure


def heatmap_rows(run: Run) -> list[int]:
    """Which parameters are shown, in the order of depth."""
    entities = run.parameters.entities
    ordered = sorted(range(len(entities)), key=lambda row: entities[row].depth)
    if len(ordered) <= _MANY_ROWS:
        return ordered
    major = [row for row in ordered if entities[row].group not in _MINOR_GROUPS]
    return major or ordered


def _extent(raster: Raster) -> tuple[float, float, float, float]:
    rows = raster.logarithm.shape[0]
    return (raster.left, raster.right, rows - 0.5, -0.5)


def _paint(figure: Figure, axes: Axes, raster: Raster, height: float, theme: Theme) -> None:
    left, right, bottom, top = _extent(raster)
    # What no image covers was not measured.
    size = (right - left, bottom - top)
    axes.add_patch(
        Rectangle((left, top), *size, fill=False, hatch="////", lw=0, ec=theme.hatch, zorder=-1)
    )
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
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03, aspect=height / _BAR_WIDTH)
        bar.outline.set_linewidth(0)
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
    if (np.isnan(raster.logarithm) & ~raster.zero & ~raster.nonfinite).any():
        entries.append(
            Patch(fc=theme.paper, ec=theme.hatch, hatch="//////", lw=0.5, label="not measured")
        )
    axes.set_xlim(raster.left, raster.right)
    axes.set_ylim(raster.logarithm.shape[0] - 0.5, -0.5)
    return entries


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
    width = (raster.right - raster.left) / columns
    x = [raster.left + (column + 0.5) * width for _, column in taken.values()]
    return x, [row for row, _ in taken.values()]


def _name_rows(
    axes: Axes, entities: Sequence[Entity], marked: Sequence[int], room: int, theme: Theme
) -> None:
    shown = shown_rows(len(entities), marked, room)
    names = [elided(entities[row].name, _NAME_LENGTH) for row in shown]
    labels = [
        MARK + name if row in marked else name for row, name in zip(shown, names, strict=True)
    ]
    axes.set_yticks(shown, labels, parse_math=False)
    axes.tick_params(axis="y", length=0)
    for row, label in zip(shown, axes.get_yticklabels(), strict=True):
        if row in marked:
            label.set(fontweight="bold", color=theme.ink)
