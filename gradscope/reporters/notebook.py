"""Reports and runs in a notebook: compact HTML that needs nothing else and fits light and dark."""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from gradscope.analysis.report import Report
from gradscope.quantities import CATALOGUE
from gradscope.record import Run
from gradscope.reporters.figures import (
    DARK,
    LIGHT,
    Theme,
    gradient_by_depth,
    gradient_heatmap,
    loss_curve,
    update_ratio,
)
from gradscope.reporters.figures.canvas import CSS_PIXELS_PER_INCH, new_figure, rendered
from gradscope.reporters.figures.loss import has_loss
from gradscope.reporters.figures.theme import drawing
from gradscope.reporters.outline import outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.templates import template
from gradscope.reporters.wording import checked, has_verdict, skipped_by_reason, verdict

_MAX_CAUSES = 5
_MAX_NOTES = 5
# Two stand side by side in a notebook.
_WIDTH, _HEIGHT = 5.0, 2.9  # inches
_PIXELS_PER_INCH = 144
# A notebook is a file that is mailed and versioned: pictures beyond this much are left out.
_MAX_PICTURE_BYTES = 260_000


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on light and on dark paper, as data URIs; its width in CSS pixels."""

    description: str
    light: str
    dark: str
    width: int


def report_html(report: Report) -> str:
    """The report: its verdict, the worst findings, small pictures, how it was measured."""
    branches = outline(report)
    harmful = [branch for branch in branches if branch.harmful]
    notes = [finding for branch in branches if not branch.harmful for finding in branch]
    state = "healthy" if has_verdict(report) else "info"
    html: str = template("notebook.html").render(
        report=report,
        verdict=verdict(report),
        state=harmful[0].severity.value if harmful else state,
        causes=harmful[:_MAX_CAUSES],
        causes_left_out=len(harmful[_MAX_CAUSES:]),
        notes=notes[:_MAX_NOTES],
        notes_left_out=len(notes[_MAX_NOTES:]),
        pictures=_affordable(_pictures(report)),
        checked=checked(report),
        skipped=skipped_by_reason(report),
        unseen=unseen(report.run),
        particulars=particulars(report.run),
    )
    return html


def run_html(run: Run) -> str:
    """The run: what it is of, and what its tables hold."""
    tables = [(name, getattr(run, name)) for name in CATALOGUE]
    html: str = template("notebook_run.html").render(
        particulars=particulars(run), tables=tables, unseen=unseen(run), scalars=sorted(run.scalars)
    )
    return html


def _pictures(report: Report) -> Iterator[Picture]:
    run, findings = report.run, report.findings
    if not len(run.recorded_steps):
        return
    yield _picture(
        partial(gradient_by_depth, run, findings=findings), "Gradient norm of each layer"
    )
    if has_loss(run):
        yield _picture(partial(loss_curve, run, findings=findings), "Loss by step")
    yield _picture(
        partial(gradient_heatmap, run, findings=findings), "Gradient norm, layers by steps"
    )
    yield _picture(
        partial(update_ratio, run, findings=findings), "Size of the updates relative to the weights"
    )


def _picture(draw: Callable[..., Figure], description: str) -> Picture:
    light, dark = (_encoded(draw, theme) for theme in (LIGHT, DARK))
    return Picture(description, light, dark, round(_WIDTH * CSS_PIXELS_PER_INCH))


def _encoded(draw: Callable[..., Figure], theme: Theme) -> str:
    with drawing(theme):
        figure, axes = new_figure(_HEIGHT, _WIDTH)
        draw(ax=axes, theme=theme)
    content = rendered(figure, dpi=_PIXELS_PER_INCH, colors=128)
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def _affordable(pictures: Iterator[Picture]) -> list[Picture]:
    """As many of the first pictures as fit."""
    shown, used = list[Picture](), 0
    for picture in pictures:
        used += len(picture.light) + len(picture.dark)
        if used > _MAX_PICTURE_BYTES:
            break
        shown.append(picture)
    return shown
