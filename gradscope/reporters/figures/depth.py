"""The picture of how the gradient changes on its way through the layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.analysis.layers import module_of
from gradscope.record import Entity, FloatArray, Run
from gradscope.reporters.figures.brackets import draw_lanes, lanes_of_layers, room_for
from gradscope.reporters.figures.canvas import (
    blank,
    canvas,
    figure_of,
    legend,
    level_lines,
    size,
    titled,
)
from gradscope.reporters.figures.labels import labelled, marked_rows, shown_rows
from gradscope.reporters.figures.theme import LIGHT, Theme

_LAYER_GROUPS = {"linear", "convolution", "recurrent", "attention", "embedding"}
_MINOR = {"bias", "norm"}
_BAND = (0.1, 0.5, 0.9)
_NAMES_PER_INCH = 5
# Beyond this points would run into one another.
_MANY_LAYERS = 80
_NAME_LENGTH = 24
_CHARACTERS_PER_INCH = 15
# Where marks for what a logarithm can't show stand, in heights of the picture.
_BOTTOM, _TOP = 0.03, 0.97

Curve = NDArray[np.float64]


def gradient_by_depth(
    run: Run, *, ax: Axes | None = None, theme: Theme = LIGHT, findings: Sequence[Finding] = ()
) -> Figure:
    """The gradient norm layer by layer: over the run, at the first and at the last step.

    It is that at the outputs of the layers that have weights; where outputs were not recorded,
    that of the weights. Brackets show the layers with a warning or an error among `findings`.
    """
    if not len(run.recorded_steps):
        return blank("Nothing was recorded.", theme, ax)
    entities, norms, broken, what = _layers(run)
    if np.isnan(norms).all() and not broken.any():
        return blank("No gradient was measured.", theme, ax)

    lanes = lanes_of_layers(entities, findings)
    with canvas(ax, 4.4, theme, room_for(lanes)) as axes:
        axes.set_yscale("log")
        _draw(axes, run, norms, theme)
        _mark(axes, norms, broken, theme)
        _name_layers(axes, entities, marked_rows(entities, findings))
        axes.set_xlim(-0.5, len(entities) - 0.5)
        axes.set_xlabel("input → output")
        axes.set_ylabel("gradient norm")
        draw_lanes(axes, lanes, theme)
        titled(axes, f"Gradient norm by depth, {what}", room_for(lanes))
        level_lines(axes, theme)
        legend(axes, own=ax is None)
    return figure_of(axes)


def _layers(run: Run) -> tuple[list[Entity], FloatArray, NDArray[np.bool_], str]:
    """The layers in the order of depth, their norms (steps, layers), and what the norms are."""
    modules = run.modules
    chosen = layers_with_weights(run)
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


def layers_with_weights(run: Run) -> list[int]:
    """The rows of the modules that have weights, in the order of execution.

    By what they hold, as a library can have a linear layer of its own; by their kind too, as a
    weight that two share is listed at one of them.
    """
    parameters = (entity for entity in run.parameters.entities if entity.group not in _MINOR)
    holders = {module_of(entity.name) for entity in parameters}
    modules = run.modules.entities
    chosen = [
        row
        for row, entity in enumerate(modules)
        if entity.group in _LAYER_GROUPS
        or (entity.group != "container" and entity.name.partition("#")[0] in holders)
    ]
    return sorted(chosen, key=lambda row: modules[row].depth)


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
        axes.plot(at, median, "-o", c=theme.line, lw=2, ms=size, label="median step", zorder=3)
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


def _name_layers(axes: Axes, entities: Sequence[Entity], marked: Sequence[int]) -> None:
    width, _ = size(axes)
    shown = shown_rows(len(entities), marked, max(2, int(width * _NAMES_PER_INCH)))
    labels = labelled(axes.xaxis, entities, shown, marked, _NAME_LENGTH)
    # The longest name sets the distance that all of them need.
    longest = max(len(label.get_text()) for label in labels)
    if len(shown) * (longest + 2) > width * _CHARACTERS_PER_INCH:
        for label in labels:
            label.set(rotation=50, ha="right", rotation_mode="anchor")
