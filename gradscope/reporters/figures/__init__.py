"""Pictures of a run. They are `matplotlib.figure.Figure`s; pyplot is never touched."""

from gradscope.reporters.figures.depth import gradient_by_depth
from gradscope.reporters.figures.heatmap import gradient_heatmap
from gradscope.reporters.figures.loss import loss_curve
from gradscope.reporters.figures.theme import DARK, LIGHT, Theme

__all__ = ["DARK", "LIGHT", "Theme", "gradient_by_depth", "gradient_heatmap", "loss_curve"]
