"""Pictures of a run. They are `matplotlib.figure.Figure`s; pyplot is never touched."""

from gradscope.reporters.figures.depth import gradient_by_depth
from gradscope.reporters.figures.heatmap import gradient_heatmap
from gradscope.reporters.figures.loss import loss_curve
from gradscope.reporters.figures.magnitudes import gradient_magnitudes
from gradscope.reporters.figures.theme import DARK, LIGHT, Theme
from gradscope.reporters.figures.updates import update_ratio

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
