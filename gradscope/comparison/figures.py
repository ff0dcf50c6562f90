"""A comparison's pictures for papers and notebooks, on their own or on axes that you bring."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradscope.comparison.critical import critical_line
from gradscope.comparison.result import Comparison, Name
from gradscope.errors import ConfigError
from gradscope.reporters.figures.canvas import canvas, figure_of, level_lines, titled
from gradscope.reporters.figures.theme import LIGHT, Theme

# Decades beyond this are all as bad.
_FULL = 6.0
_MOST_LINES = 6


def heatmap(comparison: Comparison, ax: Axes | None = None, *, theme: Theme = LIGHT) -> Figure:
    """Decades of the gradient's norm by initialization and activation; × can't train.

    Of several mitigations the first is drawn, that of the best configuration.
    """
    mitigation = comparison.best.name.mitigation
    found = [c for c in comparison.configurations if c.name.mitigation == mitigation]
    rows = list(dict.fromkeys(c.name.initialization for c in found))
    columns = list(dict.fromkeys(c.name.activation for c in found))
    values = np.full((len(rows), len(columns)), np.nan)
    height = 1.1 + 0.42 * len(rows)
    with canvas(ax, height, theme) as axes:
        for c in found:
            place = rows.index(c.name.initialization), columns.index(c.name.activation)
            decades = c.mean("decades")
            values[place] = math.nan if c.failure else decades
            said = "×" if c.failure else "–" if math.isnan(decades) else f"{decades:+.1f}"
            weight = "bold" if c.tier == 1 else "normal"
            axes.text(place[1], place[0], said, ha="center", va="center", weight=weight)
        norm = TwoSlopeNorm(0, -_FULL, _FULL)
        axes.imshow(values, cmap="PuOr", norm=norm, aspect="auto", alpha=0.75)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        titled(axes, f"{comparison.model}: powers of ten from the last layer to the first")
    return figure_of(axes)


def gradient_by_depth(
    comparison: Comparison,
    ax: Axes | None = None,
    *,
    names: tuple[Name, ...] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """The gradient's norm by layer over that at the last, as a band over seeds; theory dashed.

    names: which configurations; without it the first six. Raises ConfigError for unknown ones.
    """
    known = {c.name: c for c in comparison.configurations}
    for name in names or ():
        if name not in known:
            message = f"names: {name} was not compared; see comparison.configurations"
            raise ConfigError(message)
    chosen = [known[name] for name in names or tuple(known)[:_MOST_LINES]]
    with canvas(ax, 4.2, theme) as axes:
        for c in chosen:
            if c.depth < 2:  # noqa: PLR2004
                continue
            logs = np.where(np.isfinite(c.gradient), c.gradient, np.nan)
            relative = np.exp(logs - logs[:, -1:])
            layers = np.arange(1, c.depth + 1)
            measured = ~np.isnan(relative).all(axis=0)
            if not measured.any():
                continue
            layers, relative = layers[measured], relative[:, measured]
            (line,) = axes.plot(layers, np.nanmedian(relative, axis=0), label=str(c.name), lw=1.6)
            low, high = np.nanmin(relative, axis=0), np.nanmax(relative, axis=0)
            axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, lw=0)
            if not math.isnan(c.theory) and len(layers) > 2:  # noqa: PLR2004
                inner = layers[1:-1]
                steps = inner[-1] - inner if len(inner) else inner
                start = np.nanmedian(relative[:, -2])
                theory = start * np.exp(steps * c.theory / 2)
                axes.plot(inner, theory, ls="--", lw=1.2, color=line.get_color())
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        level_lines(axes, theme)
        titled(axes, f"{comparison.model}: gradient norm over that at the last layer")
        _names_beside(axes)
    return figure_of(axes)


def phase_diagram(
    comparison: Comparison, activation: str, ax: Axes | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """σ_w² and σ_b² of the configurations with this activation, and the line at which χ is 1.

    Left of the line gradients fade, right of it they grow (Poole et al. 2016, Schoenholz et al.
    2017). activation: of the catalogue. Raises ConfigError for an unknown one.
    """
    marked = [c for c in comparison.configurations if c.name.activation == activation]
    with canvas(ax, 4.2, theme) as axes:
        biases = np.concatenate([np.zeros(1), np.logspace(-3, 0, 40)])
        line = critical_line(activation, biases)
        drawn = np.isfinite(line.weight_variance) & (line.stability <= 1 + 1e-6)
        axes.plot(
            line.weight_variance[drawn], line.bias_variance[drawn], color=theme.ink,
            marker="o" if drawn.sum() == 1 else None, label="χ = 1",
        )  # fmt: skip
        for c in marked:
            place = c.mean("weight_variance"), c.mean("bias_variance")
            axes.plot(*place, marker="o", ls="none", label=c.name.initialization)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(-1e-4, 2)
        axes.set_xlabel("σ_w², fan-in times the variance of the weights")
        axes.set_ylabel("σ_b²")
        axes.text(0.02, 0.95, "ordered: gradients fade", transform=axes.transAxes)
        axes.text(0.98, 0.95, "chaotic: they grow", transform=axes.transAxes, ha="right")
        titled(axes, f"{comparison.model} with {activation}")
        _names_beside(axes)
    return figure_of(axes)


def _names_beside(axes: Axes) -> None:
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
