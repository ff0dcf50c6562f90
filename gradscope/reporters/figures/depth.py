"""The picture of how the gradient changes on its way through the layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.record import Entity, FloatArray, Run
from gradscope.reporters.figures.labels import MARK, elided, marked_rows, shown_rows
from gradscope.reporters.figures.theme import LIGHT, Theme, blank, drawing, new_figure

_LAYER_GROUPS = {"linear", "convolution", "recurrent", "attention", "embedding"}
_BAND = (0.1, 0.5, 0.9)
_ROOM_FOR_NAMES = 40
# Beyond this points would run into one another.
_MANY_LAYERS = 80
_NAME_LENGTH = 24
_CHARACTERS_ACROSS = 130
# Where marks for what a logarithm can't show stand, in heights of the picture.
_BOTTOM, _TOP = 0.03, 0.97

Curve = NDArray[np.float64]


def gradient_by_depth(
    run: Run, *, theme: Theme = LIGHT, findings: Sequence[Finding] = ()
) -> Figure:
    """The gradient norm layer by layer: over the run, at the first and at the last step.

    It is that at the outputs of the layers that have weights; where outputs were not recorded,
    that of the weights. Layers with a warning or an error among `findings` are marked.
    """
    if not len(run.recorded_steps):
        return blank("Nothing was recorded.", theme)
    entities, norms, broken, what = _layers(run)
    if np.isnan(norms).all() and not broken.any():
        return blank("No gradient was measured.", theme)

    with drawing(theme):
        figure, axes = new_figure(4.4)
        axes.set_yscale("log")
        _draw(axes, run, norms, theme)
        _mark(axes, norms, broken, theme)
        _name_layers(axes, entities, marked_rows(entities, findings), theme)
        axes.set_title(f"Gradient norm by depth, {what}")
        axes.set_ylabel("gradient norm")
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower left", ncols=5)
    return figure


def _layers(run: Run) -> tuple[list[Entity], FloatArray, NDArray[np.bool_], str]:
    """The layers in the order of depth, their norms (steps, layers), and what the norms are."""
    modules = run.modules
    chosen = _by_depth(modules.entities, _LAYER_GROUPS)
    norms = modules["output_grad_norm"][:, chosen]
    broken = modules["output_grad_nonfinite"][:, chosen] > 0
    if np.isfinite(norms).any() or broken.any():
        return [modules.entities[row] for row in chosen], norms, broken, "at each layer's output"
    parameters = run.parameters
    groups = {entity.group for entity in parameters.entities}
    chosen = _by_depth(parameters.entities, {"weight"} if "weight" in groups else groups)
    norms = parameters["grad_norm"][:, chosen]
    broken = parameters["grad_nonfinite"][:, chosen] > 0
    return [parameters.entities[row] for row in chosen], norms, broken, "of each weight"


def _by_depth(entities: Sequence[Entity], groups: set[str]) -> list[int]:
    chosen = [row for row, entity in enumerate(entities) if entity.group in groups]
    return sorted(chosen, key=lambda row: entities[row].depth)


def _draw(axes: Axes, run: Run, norms: FloatArray, theme: Theme) -> None:
    steps, at = run.recorded_steps, np.arange(norms.shape[1])
    size = 4 if len(at) <= _MANY_LAYERS else 0
    if len(steps) > 1:
        low, median, high = _quantiles(norms)
        last = _loggable(norms[-1])
        axes.fill_between(
            at, low, high, color=theme.line, alpha=0.18, lw=0, label="80 % of the steps"
        )
        axes.plot(at, median, "-o", c=theme.line, lw=2, ms=size, label="median step")
        axes.plot(at, last, "--^", c=theme.last, lw=1.1, ms=size, label=f"step {steps[-1]}")
    first = _loggable(norms[0])
    axes.plot(at, first, ":s", c=theme.first, lw=1.3, ms=size, label=f"step {steps[0]}")


def _quantiles(norms: FloatArray) -> tuple[Curve, ...]:
    measured = [column[np.isfinite(column)] for column in norms.T]
    found = [
        np.quantile(column, _BAND) if column.size else np.full(len(_BAND), np.nan)
        for column in measured
    ]
    return tuple(_loggable(curve) for curve in np.array(found).T)


def _loggable(norms: NDArray[np.floating[Any]]) -> Curve:
    """The norms where a logarithmic axis has a place for them, else NaN."""
    known = np.isfinite(norms) & (norms > 0)
    return np.where(known, norms, np.nan).astype(np.float64)


def _mark(axes: Axes, norms: FloatArray, broken: NDArray[np.bool_], theme: Theme) -> None:
    infinite = broken | np.isinf(norms)
    kinds = (
        ("exactly zero at some step", (norms == 0).any(axis=0), "v", _BOTTOM, theme.ink),
        ("NaN or infinite at some step", infinite.any(axis=0), "x", _TOP, theme.nonfinite),
    )
    for label, flags, marker, height, color in kinds:
        if flags.any():
            at = np.flatnonzero(flags)
            axes.scatter(
                at,
                np.full(len(at), height),
                transform=axes.get_xaxis_transform(),
                marker=marker,
                c=color,
                s=26,
                lw=1.4,
                label=label,
                clip_on=False,
            )


def _name_layers(
    axes: Axes, entities: Sequence[Entity], marked: Sequence[int], theme: Theme
) -> None:
    shown = shown_rows(len(entities), marked, _ROOM_FOR_NAMES)
    names = [elided(entities[row].name, _NAME_LENGTH) for row in shown]
    labels = [
        MARK + name if row in marked else name for row, name in zip(shown, names, strict=True)
    ]
    axes.set_xticks(shown, labels, parse_math=False)
    # The longest name sets the distance that all of them need.
    if len(shown) * (max(map(len, labels)) + 2) > _CHARACTERS_ACROSS:
        for label in axes.get_xticklabels():
            label.set(rotation=50, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(entities) - 0.5)
    axes.set_xlabel("input → output")
    for row, label in zip(shown, axes.get_xticklabels(), strict=True):
        if row in marked:
            label.set(fontweight="bold", color=theme.ink)
