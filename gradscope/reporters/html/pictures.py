"""The static pictures of the page, for print and where no script runs."""

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
    LIGHT,
    gradient_by_depth,
    gradient_heatmap,
    loss_curve,
)
from gradscope.reporters.figures.canvas import CSS_PIXELS_PER_INCH, rendered
from gradscope.reporters.figures.loss import has_loss
from gradscope.reporters.figures.theme import drawing

# Beyond this a picture of pixels may be smaller than one of shapes.
_MAX_SVG_BYTES = 100_000
_PIXELS_PER_INCH, _COLORS = 144, 128


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI; sizes in CSS pixels."""

    description: str
    source: str
    width: int
    height: int


def pictures(report: Report) -> dict[str, Picture]:
    """The pictures for print and for browsers without script: "depth", "heatmap", "loss"."""
    if not len(report.run.recorded_steps):
        return {}
    return dict(_pictures(report, report.run))


def _pictures(report: Report, run: Run) -> Iterator[tuple[str, Picture]]:
    yield (
        "depth",
        _picture(
            partial(gradient_by_depth, run, findings=report.findings),
            "Gradient norm of each layer on a logarithmic scale, from input to output; "
            f"{_range(run)}",
        ),
    )
    yield (
        "heatmap",
        _picture(
            partial(gradient_heatmap, run, findings=report.findings),
            f"Heatmap of the gradient norm, layers by steps; {_range(run)}",
        ),
    )
    if has_loss(run):
        yield "loss", _picture(partial(loss_curve, run), f"Loss by step; {_loss_range(run)}")


def _picture(draw: Callable[..., Figure], description: str) -> Picture:
    figure = draw(theme=LIGHT)
    kind, content = "svg+xml", _shapes(figure)
    if len(content) > _MAX_SVG_BYTES:
        pixels = rendered(figure, dpi=_PIXELS_PER_INCH, colors=_COLORS)
        kind, content = min((kind, content), ("png", pixels), key=lambda made: len(made[1]))
    encoded = base64.b64encode(content).decode("ascii")
    width, height = figure.get_size_inches() * CSS_PIXELS_PER_INCH
    source = f"data:image/{kind};base64,{encoded}"
    return Picture(description, source, round(width), round(height))


def _shapes(figure: Figure) -> bytes:
    content = io.BytesIO()
    with drawing(LIGHT), warnings.catch_warnings():
        # A name may have characters that matplotlib's font lacks; a browser has more fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
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
