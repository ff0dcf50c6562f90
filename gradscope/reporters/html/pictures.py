"""The pictures of the page: each for light and dark paper, inside the page, with a description."""

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from gradscope.analysis.report import Report
from gradscope.analysis.words import count, number
from gradscope.record import Run
from gradscope.reporters.figures import (
    DARK,
    LIGHT,
    Theme,
    gradient_by_depth,
    gradient_heatmap,
    loss_curve,
)
from gradscope.reporters.figures.heatmap import heatmap_rows
from gradscope.reporters.figures.loss import has_loss
from gradscope.reporters.figures.theme import drawing

# Beyond this a picture of pixels may be smaller than one of shapes.
_MAX_SVG_BYTES = 100_000
_PIXELS_PER_INCH = 160
_CSS_PIXELS_PER_INCH = 96


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in both themes, as data URIs; sizes in CSS pixels."""

    description: str
    caption: str
    light: str
    dark: str
    width: int
    height: int


def pictures(report: Report) -> list[Picture]:
    """The pictures that the run has data for."""
    run = report.run
    if not len(run.recorded_steps):
        return []
    return list(_pictures(report, run))


def _pictures(report: Report, run: Run) -> Iterator[Picture]:
    yield _picture(
        partial(gradient_by_depth, run, findings=report.findings),
        f"Gradient norm of each layer on a logarithmic scale, from input to output; {_range(run)}",
        "A line that falls steeply towards the input is a gradient that vanishes on its way "
        "back; one that rises towards the input is a gradient that explodes.",
    )
    yield _picture(
        partial(gradient_heatmap, run, findings=report.findings),
        f"Heatmap of the gradient norm, layers by steps; {_range(run)}",
        f"One row per {_heatmap_subject(run)}, the first layer on top. Where several steps share "
        "a pixel, it shows the one farthest from the row's median.",
    )
    if has_loss(run):
        yield _picture(partial(loss_curve, run), f"Loss by step; {_loss_range(run)}", "")


def _heatmap_subject(run: Run) -> str:
    whole = len(heatmap_rows(run)) == len(run.parameters.entities)
    return "parameter" if whole else "weight (biases and norms are left out)"


def _picture(draw: Callable[..., Figure], description: str, caption: str) -> Picture:
    figure, light = _rendered(draw, LIGHT)
    _, dark = _rendered(draw, DARK)
    width, height = figure.get_size_inches() * _CSS_PIXELS_PER_INCH
    return Picture(description, caption, light, dark, round(width), round(height))


def _rendered(draw: Callable[..., Figure], theme: Theme) -> tuple[Figure, str]:
    figure = draw(theme=theme)
    with drawing(theme), warnings.catch_warnings():
        # A name may have characters that matplotlib's font lacks; a browser has more fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        kind, content = "svg+xml", _saved(figure, "svg", {"Date": None, "Creator": None})
        if len(content) > _MAX_SVG_BYTES:
            pixels = _saved(figure, "png", {"Software": None})
            kind, content = min((kind, content), ("png", pixels), key=lambda made: len(made[1]))
    encoded = base64.b64encode(content).decode("ascii")
    return figure, f"data:image/{kind};base64,{encoded}"


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=_PIXELS_PER_INCH, metadata=metadata)
    return content.getvalue()


def _range(run: Run) -> str:
    norms = run.parameters["grad_norm"]
    size = f"{count(norms.shape[1], 'parameter')} at {count(norms.shape[0], 'recorded step')}"
    finite = norms[np.isfinite(norms)]
    if not finite.size:
        return f"{size}, no finite value"
    return f"{size}, from {number(float(finite.min()))} to {number(float(finite.max()))}"


def _loss_range(run: Run) -> str:
    loss = run.scalars["loss"]
    finite = loss[np.isfinite(loss)]
    if not finite.size:
        return "no finite value"
    return f"{number(float(finite[0]))} at first, {number(float(finite[-1]))} at last"
