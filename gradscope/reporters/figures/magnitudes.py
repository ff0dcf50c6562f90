"""The picture of how large the single entries of a gradient are."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.errors import ConfigError
from gradscope.record import FloatArray, Histograms, Run, StepArray
from gradscope.reporters.figures.brackets import draw_lanes, lanes_of_steps, room_for
from gradscope.reporters.figures.canvas import (
    blank,
    canvas,
    colorbar,
    figure_of,
    legend,
    step_axis,
    titled,
)
from gradscope.reporters.figures.labels import elided, same_layer
from gradscope.reporters.figures.raster import Columns, columns_of
from gradscope.reporters.figures.theme import LIGHT, Theme

# The finest steps of half precision: below the first digits get lost, below the second all.
_HALF_LIMITS = ((2.0**-14, "fp16: fewer digits below"), (2.0**-24, "fp16: zero below"))
_DECADE = float(np.log10(2))  # of one bin
_LONG_NAME = 60
# How much rarer than the most common magnitude is still seen: a square root's contrast.
_CONTRAST = 0.5
# The row of zeros is at least this part of the height.
_ROWS = 20
# Below this share whole percents say nothing.
_COARSE = 0.05

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Shares:
    """Of the entries of some parameters: the share in each bin, and that of exact zeros.

    `bins` has the shape (steps, bins), `zero` (steps); NaN where no histogram was recorded, or
    the zeros not. `edges` are exponents of ten.
    """

    steps: StepArray
    edges: FloatArray
    bins: F64
    zero: F64


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Shares (rows, columns), and from where to where they are drawn, in powers of ten."""

    label: str
    shares: F64
    low: float
    high: float


def gradient_magnitudes(
    run: Run,
    *,
    layer: str | None = None,
    ax: Axes | None = None,
    theme: Theme = LIGHT,
    findings: Sequence[Finding] = (),
) -> Figure:
    """How many of the gradient's entries have which magnitude, step by step.

    `layer` is a parameter, or a module with all its parameters; None: the whole model. Every
    parameter weighs by its number of entries. Exact zeros have a row of their own at the bottom;
    the lowest and the highest
    magnitude also hold what lies beyond. Dotted lines show below what half precision loses digits,
    and below what everything. Raises
    ConfigError for a layer of which there is no histogram.
    """
    histograms = run.histograms
    if not histograms:
        return blank("No histogram of magnitudes was recorded.", theme, ax)
    shares = shares_of(run, _rows(histograms, layer))
    filled = np.flatnonzero(np.nan_to_num(shares.bins).any(axis=0))
    zeros = bool(np.nan_to_num(shares.zero).any())
    if not filled.size and not zeros:
        return blank("No gradient was measured.", theme, ax)

    columns = columns_of(shares.steps)
    lowest, highest = (filled[0], filled[-1] + 1) if filled.size else (0, histograms.bins)
    bins = _averaged(shares.bins[:, lowest:highest], columns)
    low, high = float(shares.edges[lowest]), float(shares.edges[highest])
    parts = [Part("magnitudes", bins, low, high)]
    if zeros:
        height = max(_DECADE, (high - low) / _ROWS)
        zero = _averaged(shares.zero[:, None], columns)
        parts.append(Part("zeros", zero, low - 2 * height, low - height))
    concerned = [f for f in findings if not (layer and f.layer) or same_layer(layer, f.layer)]
    lanes = lanes_of_steps(concerned)
    with canvas(ax, 3.8, theme, room_for(lanes)) as axes:
        _paint(axes, columns, parts, theme, own=ax is None)
        _name_magnitudes(axes, parts)
        if filled.size:
            centers = columns.left + columns.width * (np.arange(bins.shape[1]) + 0.5)
            middle = low + _DECADE * _medians(bins)
            axes.plot(centers, middle, c=theme.last, lw=1.4, label="median, zeros left out")
        for limit, said in _HALF_LIMITS:
            if low < np.log10(limit) < high:
                _limit(axes, float(np.log10(limit)), said, theme)
        legend(axes, own=ax is None, over=False)
        step_axis(axes)
        axes.set_ylabel("magnitude |g|")
        draw_lanes(axes, lanes, theme)
        what = "the whole model" if layer is None else elided(layer, _LONG_NAME)
        titled(axes, f"Gradient magnitudes, {what}", room_for(lanes))
    return figure_of(axes)


def shares_of(run: Run, rows: Sequence[int]) -> Shares:
    """The shares over the parameters at these rows of the histograms."""
    histograms, table = run.histograms, run.parameters
    sizes = np.array([histograms.entities[row].numel for row in rows], np.float64)
    known = [table.names.index(histograms.names[row]) for row in rows]
    at = np.searchsorted(table.steps, histograms.steps)
    zeros = table["grad_zero_fraction"][:, known].astype(np.float64)
    broken = np.nan_to_num(table["grad_nonfinite"][:, known]) / sizes

    bins = np.full((len(histograms.steps), histograms.bins), np.nan)
    zero = np.full(len(histograms.steps), np.nan)
    for index, step in enumerate(at):
        counts = histograms.at(index)[rows].astype(np.float64)
        counted = counts.sum(axis=1)
        lost = np.nan_to_num(zeros[step]) + broken[step]
        seen = (counted > 0) | (zeros[step] > 0)
        if seen.any():
            each = counts / np.maximum(counted, 1)[:, None] * np.maximum(1 - lost, 0)[:, None]
            weights = sizes * seen / (sizes * seen).sum()
            bins[index] = weights @ each
            zero[index] = weights @ np.nan_to_num(zeros[step])
    return Shares(histograms.steps, histograms.edges * _DECADE, bins, zero)


def _rows(histograms: Histograms, layer: str | None) -> list[int]:
    names = histograms.names
    if layer is None:
        return list(range(len(names)))
    rows = [row for row, name in enumerate(names) if f"{name}.".startswith(f"{layer}.")]
    if not rows:
        modules = [name.rpartition(".")[0] for name in names]
        near = get_close_matches(layer, [*names, *modules], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"no histogram of {layer!r}{hint}"
        raise ConfigError(message)
    return rows


def _averaged(shares: F64, columns: Columns) -> F64:
    """The shares as (bins, columns): the mean over a column's steps, NaN in a pause."""
    made = np.full((shares.shape[1], len(columns.members)), np.nan)
    for column, members in enumerate(columns.members):
        known = shares[members][~np.isnan(shares[members]).any(axis=1)]
        if len(known):
            made[:, column] = known.mean(axis=0)
    return made


def _medians(bins: F64) -> F64:
    """In bins from the lowest edge: below what half of the nonzero entries are."""
    found = np.full(bins.shape[1], np.nan)
    for column, shares in enumerate(bins.T):
        reached = np.cumsum(shares)
        if reached[-1] > 0:
            middle = reached[-1] / 2
            place = int(np.searchsorted(reached, middle))
            below = reached[place - 1] if place else 0.0
            found[column] = place + (middle - below) / shares[place]
    return found


def _paint(axes: Axes, columns: Columns, parts: Sequence[Part], theme: Theme, *, own: bool) -> None:
    """All parts on the same colours."""
    colors = LinearSegmentedColormap.from_list("shares", [theme.paper, theme.line, theme.ink])
    largest = max(float(np.nanmax(part.shares)) for part in parts)
    scale = PowerNorm(_CONTRAST, vmin=0, vmax=largest)
    for start, end in columns.empty:
        axes.axvspan(start, end, fc=theme.grid, lw=0, zorder=-1, label="_pause")
    for part in parts:
        image = axes.imshow(
            np.ma.masked_invalid(part.shares), cmap=colors, norm=scale, origin="lower",
            extent=(columns.left, columns.right, part.low, part.high), aspect="auto",
            interpolation="none", label=part.label,
        )  # fmt: skip
        axes.axhline(part.high, c=theme.muted, lw=0.6, label="_edge")
    axes.set_xlim(columns.left, columns.right)
    axes.set_ylim(parts[-1].low, parts[0].high)
    bar = colorbar(axes, image, own=own)
    bar.set_label("share of entries")
    bar.formatter = PercentFormatter(1, decimals=0 if largest > _COARSE else 1)
    bar.update_ticks()


def _name_magnitudes(axes: Axes, parts: Sequence[Part]) -> None:
    low, high = parts[0].low, parts[0].high
    powers = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    ticks = {float(power): f"$10^{{{power}}}$" for power in powers[:: -(-len(powers) // 8) or 1]}
    for part in parts[1:]:
        ticks[(part.low + part.high) / 2] = "zero"
    axes.set_yticks(list(ticks), list(ticks.values()))


def _limit(axes: Axes, at: float, said: str, theme: Theme) -> None:
    halo = [withStroke(linewidth=2, foreground=theme.paper)]
    axes.axhline(at, c=theme.ink, lw=0.8, ls=(0, (1, 2)), alpha=0.8, label=f"_{said}")
    axes.annotate(
        said, (0, at), (4, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=7.5, color=theme.ink, path_effects=halo,
    )  # fmt: skip
