"""The scalars beside the tables; how many there are does not depend on the model.

What is asked for of single layers comes on top, and has a limit of its own.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradscope.log import schema
from gradscope.quantities import CATALOGUE, TableName

# The user's own scalars beyond this many are kept in the run, but get no tag of their own.
MAX_USER_TAGS = 40

LOSS = "training/loss"
GRADIENT_SPREAD = "gradient_norm_by_layer"
UPDATE_SPREAD = "update_ratio_by_layer"
LOW, MIDDLE, HIGH = "5th_percentile", "median", "95th_percentile"

_PULSE_TAGS = {
    "loss": LOSS,
    "learning_rate": "training/learning_rate",
    "loss_scale": "training/loss_scale",
    "skipped": "training/skipped",
    "grad_norm_before_clip": "gradient/norm_before_clip",
    "clipped": "gradient/clipped",
}
# Not a curve.
_HIDDEN = {"loss_nonfinite", "grad_norm_after_clip"}

Row = NDArray[np.float32]
Reduce: TypeAlias = Callable[[Row], float]


def is_users_own(name: str) -> bool:
    """Whether a name in the pulse is one that the user made up."""
    return name not in _PULSE_TAGS and name not in _HIDDEN


def pulse_scalars(
    pulses: Sequence[Mapping[str, float]], user_tags: Collection[str]
) -> dict[str, float]:
    """Tag → the latest value among some pulses, also of what is not logged at every step.

    `user_tags` are those of the user's names that have a tag in this run.
    """
    latest: dict[str, float] = {}
    for known in pulses:
        latest.update(known)
    own = {tag: latest[name] for name, tag in _PULSE_TAGS.items() if name in latest}
    return own | {f"user/{name}": latest[name] for name in latest if name in user_tags}


def margin_layout() -> schema.Value:
    """The charts of a median with its band, and of the loss, for the custom scalars tab."""
    bands = {
        "Gradient norm: median layer, 5th to 95th percentile": GRADIENT_SPREAD,
        "Update ratio: median layer, 5th to 95th percentile": UPDATE_SPREAD,
    }
    return schema.layout_value(
        "gradscope",
        {"Loss": LOSS},
        {
            title: (f"{group}/{LOW}", f"{group}/{MIDDLE}", f"{group}/{HIGH}")
            for title, group in bands.items()
        },
    )


def _norm(row: Row) -> float:
    return float(np.sqrt(np.sum(row.astype(np.float64) ** 2)))


def _median(row: Row) -> float:
    return float(np.median(row))


def _largest(row: Row) -> float:
    return float(row.max())


def _smallest(row: Row) -> float:
    return float(row.min())


def _total(row: Row) -> float:
    return float(row.sum())


def _mean(row: Row) -> float:
    return float(row.mean(dtype=np.float64))


def _quantile(share: float) -> Reduce:
    def reduce(row: Row) -> float:
        # The value of a layer there is: infinity has no neighbours to interpolate with.
        return float(np.quantile(row, share, method="inverted_cdf"))

    return reduce


_SPREAD: tuple[tuple[str, Reduce], ...] = (
    ("smallest", _smallest),
    (LOW, _quantile(0.05)),
    (MIDDLE, _median),
    (HIGH, _quantile(0.95)),
    ("largest", _largest),
)


def _spread(group: str, quantity: str) -> tuple[tuple[str, TableName, str, Reduce], ...]:
    """How a quantity differs between the parameters."""
    return tuple((f"{group}/{name}", "parameters", quantity, reduce) for name, reduce in _SPREAD)


_TABLE_TAGS: tuple[tuple[str, TableName, str, Reduce], ...] = (
    ("gradient/global_norm", "parameters", "grad_norm", _norm),
    ("gradient/nonfinite_entries", "parameters", "grad_nonfinite", _total),
    *_spread(GRADIENT_SPREAD, "grad_norm"),
    *_spread(UPDATE_SPREAD, "update_ratio"),
    ("weight/global_norm", "parameters", "weight_norm", _norm),
    ("activation/largest_rms", "modules", "output_rms", _largest),
    ("activation/dead_share_mean", "modules", "dead_unit_fraction", _mean),
    ("activation/dead_share_largest", "modules", "dead_unit_fraction", _largest),
    ("activation/saturated_share_mean", "modules", "output_saturated_fraction", _mean),
    ("activation/saturated_share_largest", "modules", "output_saturated_fraction", _largest),
)
# What there is of a single parameter.
_LAYER_QUANTITIES = ("grad_norm", "update_ratio")


def table_scalars(tables: Mapping[TableName, Row]) -> dict[str, float]:
    """Tag → number, of one recorded step; what was not measured has no point."""
    scalars: dict[str, float] = {}
    for tag, table, quantity, reduce in _TABLE_TAGS:
        index = [q.name for q in CATALOGUE[table]].index(quantity)
        row = tables[table][index]
        measured = row[~np.isnan(row)]
        if measured.size:
            scalars[tag] = reduce(measured)
    if scalars.get("gradient/nonfinite_entries", 0) > 0:
        # The norm of what is left beside NaN is not the gradient's; TensorBoard marks NaN.
        scalars["gradient/global_norm"] = math.nan
    return scalars


def layer_scalars(table: NDArray[np.float32], columns: Mapping[str, int]) -> dict[str, float]:
    """Tag → number, of single parameters (name → column) in their table of one step."""
    names = [quantity.name for quantity in CATALOGUE["parameters"]]
    broken = table[names.index("grad_nonfinite")] > 0
    scalars: dict[str, float] = {}
    for quantity in _LAYER_QUANTITIES:
        row = table[names.index(quantity)]
        for name, column in columns.items():
            if quantity == "grad_norm" and broken[column]:
                scalars[f"layer/{name}/{quantity}"] = math.nan
            elif not np.isnan(row[column]):
                scalars[f"layer/{name}/{quantity}"] = float(row[column])
    return scalars
