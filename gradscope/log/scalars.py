"""The dozen ordinary scalars beside the tables; how many there are does not depend on the model."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.quantities import CATALOGUE, TableName

# The user's own scalars beyond this many are kept in the run, but get no tag of their own.
_MAX_USER_TAGS = 40

_PULSE_TAGS = {
    "loss": "training/loss",
    "learning_rate": "training/learning_rate",
    "grad_norm_before_clip": "gradient/norm_before_clip",
}
# Not a curve.
_HIDDEN = {"loss_nonfinite"}

Row = NDArray[np.float32]


def pulse_scalars(pulses: Sequence[Mapping[str, float]], user_tags: set[str]) -> dict[str, float]:
    """Tag → the latest value among some pulses, also of what is not logged at every step.

    `user_tags` holds the user's names that have a tag in this run; the first 40 are added.
    """
    latest: dict[str, float] = {}
    for known in pulses:
        latest.update(known)
    own = {tag: latest[name] for name, tag in _PULSE_TAGS.items() if name in latest}
    users = [name for name in latest if name not in _PULSE_TAGS and name not in _HIDDEN]
    for name in users:
        if len(user_tags) < _MAX_USER_TAGS:
            user_tags.add(name)
    return own | {f"user/{name}": latest[name] for name in users if name in user_tags}


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


_TABLE_TAGS: tuple[tuple[str, TableName, str, Callable[[Row], float]], ...] = (
    ("gradient/global_norm", "parameters", "grad_norm", _norm),
    ("gradient/largest_layer_norm", "parameters", "grad_norm", _largest),
    ("gradient/median_layer_norm", "parameters", "grad_norm", _median),
    ("gradient/smallest_layer_norm", "parameters", "grad_norm", _smallest),
    ("gradient/nonfinite_entries", "parameters", "grad_nonfinite", _total),
    ("update/median_ratio", "parameters", "update_ratio", _median),
    ("update/largest_ratio", "parameters", "update_ratio", _largest),
    ("weight/global_norm", "parameters", "weight_norm", _norm),
    ("output/largest_rms", "modules", "output_rms", _largest),
    ("output/largest_dead_unit_fraction", "modules", "dead_unit_fraction", _largest),
    ("output/largest_saturated_fraction", "modules", "output_saturated_fraction", _largest),
)


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
