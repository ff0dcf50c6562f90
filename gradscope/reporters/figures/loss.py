"""The picture of the loss."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.record import Run
from gradscope.reporters.figures.brackets import draw_lanes, lanes_of_steps, room_for
from gradscope.reporters.figures.canvas import (
    blank,
    canvas,
    figure_of,
    legend,
    level_lines,
    step_axis,
    titled,
)
from gradscope.reporters.figures.raster import spaced
from gradscope.reporters.figures.theme import LIGHT, Theme

# A loss that spans more than this is drawn on a logarithmic axis.
_WIDE_RANGE = 30
_TOP = 0.97


def has_loss(run: Run) -> bool:
    """Whether a loss was seen."""
    loss = run.scalars.get("loss")
    return loss is not None and not np.isnan(loss).all()


def loss_curve(
    run: Run, *, ax: Axes | None = None, theme: Theme = LIGHT, findings: Sequence[Finding] = ()
) -> Figure:
    """The loss at every step at which it is known.

    Brackets show from when to when each warning and error among `findings` was seen.
    """
    if not has_loss(run):
        return blank("No loss was seen.", theme, ax)
    loss = run.scalars["loss"]
    finite = np.isfinite(loss)
    steps, known = run.steps[finite], loss[finite]
    lanes = lanes_of_steps(findings)
    with canvas(ax, 2.6, theme, room_for(lanes)) as axes:
        axes.plot(steps, known, "-" if len(known) > 1 else "o", c=theme.line, lw=1.4)
        if known.size and known.min() > 0 and known.max() > _WIDE_RANGE * known.min():
            axes.set_yscale("log")
        else:
            # Room above the axes is for the findings, not for a power of ten.
            axes.yaxis.set_major_formatter("{x:.7g}")
        broken = spaced(run.steps[_not_finite(run)], run.steps)
        if len(broken):
            axes.scatter(
                broken,
                np.full(len(broken), _TOP),
                transform=axes.get_xaxis_transform(),
                marker="x",
                c=theme.nonfinite,
                s=26,
                label="NaN or infinite",
            )
        step_axis(axes, run.steps)
        axes.set_ylabel("loss")
        draw_lanes(axes, lanes, theme)
        titled(axes, "Loss", room_for(lanes))
        level_lines(axes, theme)
        legend(axes, own=ax is None)
    return figure_of(axes)


def _not_finite(run: Run) -> NDArray[np.bool_]:
    """A loss of NaN reads like one that is not known; the flag tells them apart."""
    loss = run.scalars["loss"]
    flagged = run.scalars.get("loss_nonfinite", np.zeros(len(loss))) > 0
    return np.isinf(loss) | (np.isnan(loss) & flagged)
