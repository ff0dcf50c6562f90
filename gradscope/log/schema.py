"""The records of a run: their tags, and how each becomes a TensorBoard summary value and back.

Own records carry the plugin name `gradscope`. Tables are float32 tensors of shape (quantities,
entities); column i is always the i-th entity of the append-only entity list; where rows are left
out, the metadata say of which quantities those there are, a byte for each. The pulse is a float64
tensor of shape (steps, columns); its metadata name the columns, or nothing where they are the usual
ones: a long run has a million of them. The counts of a step's histograms
are one packed string, whose metadata name the bins. Everything else is JSON.
"""

import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import (
    histogram_pb2,
    summary_pb2,
    tensor_pb2,
    tensor_shape_pb2,
    types_pb2,
)
from tensorboard.plugins.custom_scalar import layout_pb2

from gradscope.quantities import MAGNITUDES, Magnitudes, TableName
from gradscope.record import CountArray, pack_counts

# 1: the first. 2: tables without the quantities that were not measured of anything. 3: pulses that
# do not name the columns that nearly all have.
FORMAT_VERSION = 3

PLUGIN = "gradscope"
FILE_SUFFIX = ".gradscope"
# What TensorBoard looks for in a file's name.
FILE_PREFIX = "events.out.tfevents."

HEADER = "gradscope/header"
# What a further file of the same run begins with, in place of the header.
RESUMED = "gradscope/resumed"
ENTITIES = "gradscope/entities"
PULSE = "gradscope/pulse"
PROBLEM = "gradscope/problem"
COVERAGE = "gradscope/coverage"
GRAPH = "gradscope/graph"
_HISTOGRAMS = "gradscope/histograms"
# Those of gradients were there first.
COUNTS: dict[Magnitudes, str] = {
    of: _HISTOGRAMS if of == "grad" else f"{_HISTOGRAMS}/{of}" for of in MAGNITUDES
}
# JSON, which is of no step: numbered by a sequence of their own.
NUMBERED = frozenset({HEADER, RESUMED, ENTITIES, PROBLEM, COVERAGE, GRAPH})
# The large one among them is packed: a graph's nodes are much alike.
_PACKED = frozenset({GRAPH})
# For TensorBoard alone.
FINDINGS = "gradscope/findings"
WORST_LAYERS = "gradscope/worst_layers"
TABLES: dict[TableName, str] = {
    "parameters": "gradscope/parameters",
    "modules": "gradscope/modules",
    "signals": "gradscope/signals",
}

# TensorBoard's number for red, green and blue.
_RGB = 3

Value: TypeAlias = summary_pb2.Summary.Value


def _metadata(plugin: str, content: bytes = b"") -> summary_pb2.SummaryMetadata:
    # Without a data class neither of TensorBoard's loaders shows a tag to plugins.
    return summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin, content=content),
        data_class=summary_pb2.DATA_CLASS_TENSOR,
    )


def _shape(sizes: Sequence[int]) -> tensor_shape_pb2.TensorShapeProto:
    dim = tensor_shape_pb2.TensorShapeProto.Dim
    return tensor_shape_pb2.TensorShapeProto(dim=[dim(size=size) for size in sizes])


def array_value(tag: str, array: NDArray[Any], content: bytes = b"") -> Value:
    """A tensor record; `array` is float32 or float64."""
    dtype = types_pb2.DT_FLOAT if array.dtype == np.float32 else types_pb2.DT_DOUBLE
    tensor = tensor_pb2.TensorProto(
        dtype=dtype, tensor_shape=_shape(array.shape), tensor_content=array.tobytes()
    )
    return Value(tag=tag, tensor=tensor, metadata=_metadata(PLUGIN, content))


def read_array(value: Value) -> NDArray[Any]:
    """The array of a tensor record, read-only."""
    tensor = value.tensor
    dtype = np.float32 if tensor.dtype == types_pb2.DT_FLOAT else np.float64
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    return np.frombuffer(tensor.tensor_content, dtype=dtype).reshape(shape)


def table_value(table: TableName, array: NDArray[np.float32]) -> Value:
    """A table (quantities × entities); what was not measured of any entity is left out."""
    there = np.flatnonzero(~np.isnan(array).all(axis=1))
    if there.size in (0, len(array)):
        return array_value(TABLES[table], array)
    return array_value(TABLES[table], array[there], bytes(there.tolist()))


def read_table(value: Value, quantities: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which of the quantities were measured of anything, and the rows of these, read-only."""
    array = read_array(value)
    content = value.metadata.plugin_data.content
    there = np.frombuffer(content, np.uint8).astype(np.intp) if content else np.arange(quantities)
    if array.ndim != 2 or len(array) != len(there) or there.max(initial=-1) >= quantities:  # noqa: PLR2004
        message = f"a table of shape {array.shape}, {quantities} quantities"
        raise ValueError(message)
    return there, array


def _string_value(tag: str, string: bytes, plugin: str, content: bytes = b"") -> Value:
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, tensor_shape=_shape([1]), string_val=[string]
    )
    return Value(tag=tag, tensor=tensor, metadata=_metadata(plugin, content))


def json_value(tag: str, content: Mapping[str, Any]) -> Value:
    """A record of JSON."""
    text = json.dumps(content, allow_nan=False).encode()
    return _string_value(tag, zlib.compress(text) if tag in _PACKED else text, PLUGIN)


def read_json(value: Value) -> dict[str, Any]:
    """The content of a JSON record."""
    text = value.tensor.string_val[0]
    content: dict[str, Any] = json.loads(zlib.decompress(text) if value.tag in _PACKED else text)
    return content


_USUAL = ["step", "loss", "loss_nonfinite", "learning_rate"]


def pulse_value(columns: Sequence[str], rows: NDArray[np.float64]) -> Value:
    """The pulse of some steps: `rows` has a column per name, the first is the step."""
    if set(columns) == set(_USUAL):
        return array_value(PULSE, rows[:, [columns.index(name) for name in _USUAL]])
    return array_value(PULSE, rows, json.dumps(list(columns)).encode())


def read_pulse(value: Value) -> tuple[list[str], NDArray[np.float64]]:
    """The column names and the rows of a pulse record."""
    return _columns(value.metadata.plugin_data.content), read_array(value)


@lru_cache(maxsize=64)
def _columns(content: bytes) -> list[str]:
    # Nearly always those of the record before.
    columns: list[str] = json.loads(content) if content else _USUAL
    return columns


def counts_value(lowest: int, counts: CountArray, of: Magnitudes = "grad") -> Value:
    """Counts (entities × bins) by octaves; `lowest` is the exponent of the first bin."""
    bins = {"lowest": lowest, "bins": counts.shape[1]}
    return _string_value(COUNTS[of], pack_counts(counts), PLUGIN, json.dumps(bins).encode())


def read_counts(value: Value) -> tuple[int, int, bytes]:
    """The exponent of the first bin, how many bins there are, and the packed counts."""
    return *_bins(value.metadata.plugin_data.content), value.tensor.string_val[0]


@lru_cache(maxsize=64)
def _bins(content: bytes) -> tuple[int, int]:
    bins: dict[str, int] = json.loads(content)
    return bins["lowest"], bins["bins"]


def text_value(tag: str, markdown: str) -> Value:
    """A text that TensorBoard's own text tab shows."""
    return _string_value(tag, markdown.encode(), "text")


def scalar_value(tag: str, number: float) -> Value:
    """A scalar that TensorBoard's own scalars tab shows."""
    return Value(tag=tag, simple_value=number)


def image_value(tag: str, png: bytes) -> Value:
    """A picture that TensorBoard's own images tab shows."""
    # Both stand at the beginning of every PNG (ISO/IEC 15948, 11.2.2).
    width, height = struct.unpack_from(">II", png, offset=16)
    image = summary_pb2.Summary.Image(
        width=width, height=height, colorspace=_RGB, encoded_image_string=png
    )
    return Value(tag=tag, image=image)


def histogram_value(
    tag: str, edges: NDArray[np.floating[Any]], counts: NDArray[np.integer[Any]]
) -> Value:
    """A histogram that TensorBoard's own histograms tab shows.

    Of the bins (one edge more than counts) those from the first to the last that hold anything
    are written; `counts` are not all zero.
    """
    held = np.flatnonzero(counts)
    first, last = int(held[0]), int(held[-1])
    counts, edges = counts[first : last + 1], edges[first : last + 2]
    centers = (edges[:-1] + edges[1:]) / 2
    histogram = histogram_pb2.HistogramProto(
        # TensorBoard takes these for the outermost edges, and the limits for right edges.
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=counts @ centers,
        sum_squares=counts @ centers**2,
        bucket_limit=edges[1:],
        bucket=counts,
    )
    return Value(tag=tag, histo=histogram)


def layout_value(
    title: str, curves: Mapping[str, str], bands: Mapping[str, tuple[str, str, str]]
) -> Value:
    """Charts for TensorBoard's custom scalars tab, by title.

    A curve is a tag; a band is the tags of its lower edge, its line and its upper edge.
    """
    charts = [
        layout_pb2.Chart(
            title=name, multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$"])
        )
        for name, tag in curves.items()
    ]
    for name, (lower, line, upper) in bands.items():
        series = layout_pb2.MarginChartContent.Series(lower=lower, value=line, upper=upper)
        margin = layout_pb2.MarginChartContent(series=[series])
        charts.append(layout_pb2.Chart(title=name, margin=margin))
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=title, chart=charts)])
    return _string_value("custom_scalars__config__", layout.SerializeToString(), "custom_scalars")
