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


def _total(row: Row) -> float:
    return float(row.sum())


def _mean(row: Row) -> float:
    return float(row.mean(dtype=np.float64))


def _median(row: Row) -> float:
    # What numpy's does after sorting once more.
    return float((row[(row.size - 1) // 2] + row[row.size // 2]) / row.dtype.type(2))


def _quantile(share: float) -> Reduce:
    def reduce(row: Row) -> float:
        # The value of a layer there is: infinity has no neighbours to interpolate with.
        return float(row[max(math.ceil(row.size * share) - 1, 0)])

    return reduce


_smallest, _largest = _quantile(0.0), _quantile(1.0)
_SPREAD: dict[str, Reduce] = {
    "smallest": _smallest,
    LOW: _quantile(0.05),
    MIDDLE: _median,
    HIGH: _quantile(0.95),
    "largest": _largest,
}


def _spread(group: str) -> dict[str, Reduce]:
    """How a quantity differs between the parameters."""
    return {f"{group}/{name}": reduce for name, reduce in _SPREAD.items()}


# By table and quantity: tag → what it shows of the numbers that there are, in ascending order.
_TABLE_TAGS: dict[tuple[TableName, str], dict[str, Reduce]] = {
    ("parameters", "grad_norm"): {"gradient/global_norm": _norm, **_spread(GRADIENT_SPREAD)},
    ("parameters", "grad_nonfinite"): {"gradient/nonfinite_entries": _total},
    ("parameters", "update_ratio"): _spread(UPDATE_SPREAD),
    ("parameters", "weight_norm"): {"weight/global_norm": _norm},
    ("modules", "output_rms"): {"activation/largest_rms": _largest},
    ("modules", "dead_unit_fraction"): {
        "activation/dead_share_mean": _mean,
        "activation/dead_share_largest": _largest,
    },
    ("modules", "output_saturated_fraction"): {
        "activation/saturated_share_mean": _mean,
        "activation/saturated_share_largest": _largest,
    },
}
_INDEX: dict[tuple[TableName, str], int] = {
    (table, quantity.name): index
    for table, listed in CATALOGUE.items()
    for index, quantity in enumerate(listed)
}
# What there is of a single parameter.
_LAYER_QUANTITIES = ("grad_norm", "update_ratio")


def table_scalars(tables: Mapping[TableName, Row]) -> dict[str, float]:
    """Tag → number, of one recorded step; what was not measured has no point."""
    scalars: dict[str, float] = {}
    for key, tags in _TABLE_TAGS.items():
        row = tables[key[0]][_INDEX[key]]
        measured = np.sort(row[~np.isnan(row)])
        if measured.size:
            scalars |= {tag: reduce(measured) for tag, reduce in tags.items()}
    if scalars.get("gradient/nonfinite_entries", 0) > 0:
        # The norm of what is left beside NaN is not the gradient's; TensorBoard marks NaN.
        scalars["gradient/global_norm"] = math.nan
    return scalars


def layer_scalars(table: NDArray[np.float32], columns: Mapping[str, int]) -> dict[str, float]:
    """Tag → number, of single parameters (name → column) in their table of one step."""
    if not columns:
        return {}
    broken = table[_INDEX["parameters", "grad_nonfinite"]] > 0
    scalars: dict[str, float] = {}
    for quantity in _LAYER_QUANTITIES:
        row = table[_INDEX["parameters", quantity]]
        for name, column in columns.items():
            if quantity == "grad_norm" and broken[column]:
                scalars[f"layer/{name}/{quantity}"] = math.nan
            elif not np.isnan(row[column]):
                scalars[f"layer/{name}/{quantity}"] = float(row[column])
    return scalars
