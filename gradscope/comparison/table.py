"""A comparison as a DataFrame."""

import math

import numpy as np
import pandas as pd

from gradscope.comparison.result import Comparison, Configuration


def frame(comparison: Comparison) -> pd.DataFrame:
    """One row per configuration, best first.

    growth_per_layer and theory: the factor of the gradient's norm per layer, towards the input.
    first_to_last: ‖gradient‖ at the first layer over that at the last.
    """
    return pd.DataFrame([_row(c) for c in comparison.configurations])


def per_layer(slope: float) -> float:
    """√χ of ln χ: the factor of the norm, not of its square."""
    return math.exp(slope / 2)


def _row(c: Configuration) -> dict[str, object]:
    means = (
        "decades",
        "time_decades",
        "spread",
        "drift",
        "dead",
        "saturated",
        "similarity",
        "update_ratio",
        "conditioning",
        "trained",
        "learning_rate",
        "early",
    )
    return {
        "initialization": c.name.initialization,
        "activation": c.name.activation,
        "mitigation": c.name.mitigation,
        "tier": c.tier,
        "score": c.score.mean,
        "score_low": c.score.low,
        "score_high": c.score.high,
        "growth_per_layer": per_layer(c.growth.mean),
        "theory": per_layer(c.theory),
        "first_to_last": _first_to_last(c),
        **{name: c.mean(name) for name in means},
        "failure": c.failure,
        "remark": c.remark,
    }


def _first_to_last(c: Configuration) -> float:
    logs = [cell.gradient[0] - cell.gradient[-1] for cell in c.cells if len(cell.gradient)]
    return float(np.exp(np.mean(logs))) if logs and np.isfinite(logs).all() else math.nan
