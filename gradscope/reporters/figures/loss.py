"""The picture of the loss."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradscope.record import Run
from gradscope.reporters.figures.theme import LIGHT, Theme, blank, drawing, new_figure, step_axis

# A loss that spans more than this is drawn on a logarithmic axis.
_WIDE_RANGE = 30
_TOP = 0.97


def has_loss(run: Run) -> bool:
    """Whether a loss was seen."""
    loss = run.scalars.get("loss")
    return loss is not None and not np.isnan(loss).all()


def loss_curve(run: Run, *, theme: Theme = LIGHT) -> Figure:
    """The loss at every step at which it is known."""
    if not has_loss(run):
        return blank("No loss was seen.", theme)
    loss = run.scalars["loss"]
    finite = np.isfinite(loss)
    steps, known = run.steps[finite], loss[finite]
    with drawing(theme):
        figure, axes = new_figure(2.6)
        axes.plot(steps, known, "-" if len(known) > 1 else "o", c=theme.line, lw=1.4)
        if known.size and known.min() > 0 and known.max() > _WIDE_RANGE * known.min():
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        broken = run.steps[_not_finite(run)]
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
            figure.legend(loc="outside lower left")
        axes.set_title("Loss")
        step_axis(axes)
        axes.grid(visible=True, axis="y")
        margin = max(1.0, 0.01 * float(run.steps[-1] - run.steps[0]))
        axes.set_xlim(float(run.steps[0]) - margin, float(run.steps[-1]) + margin)
    return figure


def _not_finite(run: Run) -> NDArray[np.bool_]:
    """A loss of NaN reads like one that is not known; the flag tells them apart."""
    loss = run.scalars["loss"]
    flagged = run.scalars.get("loss_nonfinite", np.zeros(len(loss))) > 0
    return np.isinf(loss) | (np.isnan(loss) & flagged)
