"""Pictures of a run, for notebooks and papers: `gradscope.figures.gradient_by_depth(run)`.

Each is `f(run, *, ax=None, theme=LIGHT, findings=()) -> matplotlib.figure.Figure`. Without `ax` it
makes a figure of its own, which a notebook shows as the last line of a cell; `save` it with
`figure.savefig("depth.pdf")`. With `ax` it draws into the given axes, whose fonts and paper stay
as they are, and returns their figure. `findings=report.findings` marks what is wrong, with the
code. Neither pyplot nor its settings are touched.
"""

from gradscope.reporters.figures import (
    DARK,
    LIGHT,
    Theme,
    gradient_by_depth,
    gradient_heatmap,
    gradient_magnitudes,
    loss_curve,
    update_ratio,
)

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "gradient_by_depth",
    "gradient_heatmap",
    "gradient_magnitudes",
    "loss_curve",
    "update_ratio",
]
