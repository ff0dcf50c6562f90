"""Sufficient statistics → the quantities of the tables: the one place that knows the formulas."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradscope.capture.spread import SPREAD
from gradscope.capture.statistics import MOMENTS, OCTAVES
from gradscope.quantities import CATALOGUE, MAGNITUDES, Magnitudes, TableName
from gradscope.record import CountArray

F64 = NDArray[np.float64]

# What a row of numbers holds:
What = Literal[
    "gradient",  # moments of a parameter's gradient
    "touched",  # rows of an embedding's gradient that are not zero, rows
    "magnitudes",  # sampled entries of a parameter's gradient per octave; subnormal; finite
    # The same of the weight and of the update's sample, of the entries of a sample of outputs
    # and of gradients arriving there.
    "weight_magnitudes",
    "update_magnitudes",
    "output_magnitudes",
    "output_gradient_magnitudes",
    "weight",  # Σw² of the finite entries, their number
    # Σ Δw², Σ g·Δw, Σ g², number of the sampled coordinates; number and unchanged of those with
    # a gradient other than zero; entries / sampled
    "update",
    # Of sampled coordinates of a gradient and of that of the step before: Σ g·g', Σ g², Σ g'².
    "previous",
    # Of a bias: Σ g·d, Σ g², Σ d² where d are the sums of what arrived at the layer's output, and
    # what Σ d² has to exceed to be more than rounding.
    "balance",
    "duplicates",  # rows that equal another one, rows
    "epsilon",  # coordinates below Adam's epsilon, coordinates
    "output",  # moments of a module's output
    "output_gradient",  # moments of the gradient arriving there
    "underflow",  # subnormal ones among its sampled entries, finite ones
    "similarity",  # mean cosine of two samples' outputs, 1; or 0, 0
    "saturated",  # outputs at the end of their range, outputs
    "dead",  # dead units, units
    "time",  # moments of the gradient along time, of all time steps
    "time_first",  # … of the first time step
    "time_middle",
    "time_last",
    "time_steps",  # time steps, 1
    "attention_logit",  # the largest logit
    "attention_bound",  # what no logit exceeds
    "attention_entropy",  # Σ of the rows' entropies, rows
    "training",  # 1 where a module ran in training mode
    "buffers",  # Σ of the squares of a batch norm's running mean, or variance; their number
    "signal",  # moments of a signal
    "signal_spread",  # see SPREAD: the numbers, then of each in how many forwards it is known
    "signal_repeated",  # 1 where the signal is that of the step before
]
# Of one kind: the entity of each row, and the rows.
Block: TypeAlias = tuple[Sequence[int], F64]
RowsByKind: TypeAlias = dict[What, Block]

# Half of the entries: then the sample's own error doubles.
_IDLE = 0.5

_SMALLEST = np.finfo(np.float32).smallest_subnormal

_COUNT, _SUM, _SUMSQ, _MIN, _MAX, _ZEROS, _NONFINITE = range(len(MOMENTS))


def tables(
    rows: RowsByKind,
    flags: Mapping[str, Mapping[int, float]],
    sizes: Mapping[TableName, int],
) -> dict[TableName, NDArray[np.float32]]:
    """The tables of one step, each of shape (quantities, entities); NaN: not measured."""
    # Of float64 gradients beyond 1e154 the squares overflow: an infinite norm, and no spread.
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            "parameters": _table(
                "parameters", sizes, _parameters(rows, flags, sizes["parameters"])
            ),
            "modules": _table("modules", sizes, _modules(rows)),
            "signals": _table("signals", sizes, _signals(rows)),
        }


_COUNTED: Mapping[Magnitudes, What] = {
    "grad": "magnitudes",
    "weight": "weight_magnitudes",
    "update": "update_magnitudes",
    "output": "output_magnitudes",
    "output_grad": "output_gradient_magnitudes",
}


def histograms(rows: RowsByKind, sizes: Mapping[TableName, int]) -> dict[Magnitudes, CountArray]:
    """Counts per octave of shape (entities, octaves), of all that was counted."""
    found = {}
    for of, what in _COUNTED.items():
        if what in rows:
            entities, counted = merge_sums(rows[what])
            found[of] = counts = np.zeros((sizes[MAGNITUDES[of]], OCTAVES), np.uint32)
            counts[entities] = counted[:, :OCTAVES]
    return found


# Per quantity: the entities it is known for, and its values.
_Columns = dict[str, tuple[NDArray[np.int64], F64]]


def _table(
    name: TableName, sizes: Mapping[TableName, int], columns: _Columns
) -> NDArray[np.float32]:
    table = np.full((len(CATALOGUE[name]), sizes[name]), np.nan)
    for row, quantity in zip(table, CATALOGUE[name], strict=True):
        if quantity.name in columns:
            entities, values = columns[quantity.name]
            row[entities] = values
    # What float32 can't hold becomes infinite: larger than every limit. Or its smallest number:
    # zero means that nothing was there.
    narrow = table.astype(np.float32)
    lost = (narrow == 0) & (table != 0)
    narrow[lost] = np.copysign(_SMALLEST, table[lost])
    return narrow


def _parameters(rows: RowsByKind, flags: Mapping[str, Mapping[int, float]], size: int) -> _Columns:
    columns = _described("grad_", rows.get("gradient"))
    for quantity, known in flags.items():
        size_known = len(known)
        columns[quantity] = (
            np.fromiter(known, np.int64, size_known),
            np.fromiter(known.values(), np.float64, size_known),
        )
    if "touched" in rows:
        entities, total = merge_sums(rows["touched"])
        columns["grad_touched_fraction"] = (entities, _ratio(total[:, 0], total[:, 1]))
    if "magnitudes" in rows:
        entities, total = merge_sums(rows["magnitudes"])
        share = _ratio(total[:, OCTAVES], total[:, OCTAVES + 1])
        columns["grad_underflow_fraction"] = (entities, share)
    columns |= _probed(rows)
    norms = np.full(size, np.nan)
    if "weight" in rows:
        entities, total = merge_sums(rows["weight"])
        # Of a weight without a finite entry there is no norm.
        norm = np.where(total[:, 1] > 0, np.sqrt(total[:, 0]), np.nan)
        columns["weight_norm"] = (entities, norm)
        columns["weight_rms"] = (entities, norm / np.sqrt(np.maximum(total[:, 1], 1)))
        norms[entities] = norm
    if "update" in rows:
        entities, total = merge_sums(rows["update"])
        change = np.where(total[:, 3] > 0, np.sqrt(total[:, 0]), np.nan)
        columns["update_lost_fraction"] = (entities, _ratio(total[:, 5], total[:, 4]))
        # A sample of the coordinates stands for all of them.
        whole = change * np.sqrt(total[:, 6])
        # A sample of mostly idle coordinates, as of an embedding, says nothing.
        zeros = np.zeros(size)
        read, share = columns["grad_zero_fraction"]
        zeros[read] = share
        idle = zeros[entities] > _IDLE
        whole[(total[:, 6] > 1) & idle] = np.nan
        change[(total[:, 6] > 1) & idle] = np.nan
        columns["update_norm"] = (entities, whole)
        columns["update_ratio"] = (entities, _ratio(whole, norms[entities]))
        columns["update_gradient_cosine"] = (
            entities,
            _ratio(total[:, 1], change * np.sqrt(total[:, 2])),
        )
    return columns


def _probed(rows: RowsByKind) -> _Columns:
    columns: _Columns = {}
    shares: tuple[tuple[What, str], ...] = (
        ("duplicates", "duplicate_rows_fraction"),
        ("epsilon", "epsilon_share"),
    )
    for what, quantity in shares:
        if what in rows:
            entities, total = merge_sums(rows[what])
            columns[quantity] = (entities, _ratio(total[:, 0], total[:, 1]))
    if "previous" in rows:
        entities, total = merge_sums(rows["previous"])
        columns["grad_previous_cosine"] = (entities, _cosine(total))
    if "balance" in rows:
        entities, total = merge_sums(rows["balance"])
        # Of a bias before a batch norm, say, the gradient is zero but for rounding.
        total = np.where(total[:, 2:3] > total[:, 3:], total, np.nan)
        columns["grad_balance"] = (entities, _ratio(total[:, 0], total[:, 2]))
        columns["grad_balance_cosine"] = (entities, _cosine(total))
    return columns


def _cosine(products: F64) -> F64:
    """Of Σ x·y, Σ x² and Σ y²."""
    return _ratio(products[:, 0], np.sqrt(products[:, 1]) * np.sqrt(products[:, 2]))


def _modules(rows: RowsByKind) -> _Columns:
    columns = _described("output_", rows.get("output"))
    columns |= _described("output_grad_", rows.get("output_gradient"))
    means: tuple[tuple[What, str], ...] = (
        ("saturated", "output_saturated_fraction"),
        ("dead", "dead_unit_fraction"),
        ("time_steps", "time_steps"),
        ("attention_entropy", "attention_entropy"),
        ("underflow", "output_grad_underflow_fraction"),
        ("training", "training"),
        ("similarity", "output_sample_similarity"),
    )
    for what, quantity in means:
        if what in rows:
            entities, total = merge_sums(rows[what])
            columns[quantity] = (entities, _ratio(total[:, 0], total[:, 1]))
    largest: tuple[tuple[What, str], ...] = (
        ("attention_logit", "attention_logit_max"),
        ("attention_bound", "attention_logit_bound"),
    )
    for what, quantity in largest:
        if what in rows:
            entities, top = _largest(rows[what])
            # Of nothing that is finite there is no largest.
            columns[quantity] = (entities, np.where(np.isneginf(top), np.nan, top))
    steps: tuple[tuple[What, str], ...] = (
        ("time_first", "time_grad_first"),
        ("time_middle", "time_grad_middle"),
        ("time_last", "time_grad_last"),
    )
    for what, quantity in steps:
        if what in rows:
            columns[quantity] = _described("", rows[what])["norm"]
    if "buffers" in rows:
        entities, total = merge_sums(rows["buffers"])
        columns["buffer_norm"] = (entities, np.sqrt(total[:, 0]))
    return columns | _described("time_grad_", rows.get("time"))


def _signals(rows: RowsByKind) -> _Columns:
    """Over micro-batches min, max, mean, std and rms are those of all; of the rest the mean."""
    columns = _described("", rows.get("signal"))
    if "signal_spread" in rows:
        entities, total = merge_sums(rows["signal_spread"])
        for place, quantity in enumerate(SPREAD):
            known = total[:, len(SPREAD) + place]
            columns[quantity] = (entities, _ratio(total[:, place], known))
    if "signal_repeated" in rows:
        entities, total = merge_sums(rows["signal_repeated"])
        columns["repeated"] = (entities, total[:, 0])
    return columns


def merge_sums(block: Block) -> tuple[NDArray[np.int64], F64]:
    """The rows of each entity added up: (entities, sums)."""
    entities, at, numbers = _grouped(block)
    if at is None:
        return entities, numbers
    total = np.zeros((len(entities), numbers.shape[1]))
    np.add.at(total, at, numbers)
    return entities, total


def _grouped(block: Block) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, F64]:
    """The entities, each once; which of them each row is of (None: row by row); the rows."""
    known, numbers = block
    if len(set(known)) == len(known):
        return np.array(known, np.int64), None, numbers
    entities, at = np.unique(np.array(known, np.int64), return_inverse=True)
    return entities, at, numbers


def _largest(block: Block) -> tuple[NDArray[np.int64], F64]:
    """The largest number of each entity: (entities, numbers)."""
    entities, at, numbers = _grouped(block)
    if at is None:
        return entities, numbers[:, 0]
    top = np.full(len(entities), -np.inf)
    np.maximum.at(top, at, numbers[:, 0])
    return entities, top


def merge_moments(block: Block) -> tuple[NDArray[np.int64], F64]:
    """The moments of each entity over micro-batches: exact, in any order."""
    entities, at, numbers = _grouped(block)
    if at is None:
        return entities, numbers
    total = np.zeros((len(entities), numbers.shape[1]))
    np.add.at(total, at, numbers)
    total[:, _MIN], total[:, _MAX] = np.inf, -np.inf
    np.minimum.at(total[:, _MIN], at, numbers[:, _MIN])
    np.maximum.at(total[:, _MAX], at, numbers[:, _MAX])
    return entities, total


def _described(prefix: str, block: Block | None) -> _Columns:
    """Norm, rms, mean, std, absmax, zero fraction, non-finite count, min and max.

    NaN where no entry was finite; the count of non-finite entries is always known.
    """
    if block is None:
        return {}
    entities, merged = merge_moments(block)
    count = np.where(merged[:, _COUNT] > 0, merged[:, _COUNT], np.nan)
    mean = merged[:, _SUM] / count
    square = merged[:, _SUMSQ] / count
    absmax = np.maximum(merged[:, _MAX], -merged[:, _MIN])
    # Of float64 entries below 1e-162 the squares are zero; the largest one is a lower bound.
    norm = np.maximum(np.sqrt(square * count), absmax)
    # A difference of large numbers is not exact; nothing spreads by more than half its range.
    spread = np.sqrt(np.maximum(square - mean**2, 0.0))
    half = (merged[:, _MAX] - merged[:, _MIN]) / 2
    quantities = {
        "norm": norm,
        "rms": norm / np.sqrt(count),
        "mean": mean,
        "std": np.minimum(spread, half),
        "absmax": np.where(count > 0, absmax, np.nan),
        "zero_fraction": merged[:, _ZEROS] / count,
        "nonfinite": merged[:, _NONFINITE],
        "min": np.where(count > 0, merged[:, _MIN], np.nan),
        "max": np.where(count > 0, merged[:, _MAX], np.nan),
    }
    return {prefix + name: (entities, values) for name, values in quantities.items()}


def _ratio(above: F64, below: F64) -> F64:
    """The quotient; NaN where it is not defined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: F64 = np.where(below > 0, above / below, np.nan)
    return quotient
