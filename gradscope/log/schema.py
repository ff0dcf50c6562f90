"""The records of a run: their tags, and how each becomes a TensorBoard summary value and back.

Own records carry the plugin name `gradscope`. Tables are float32 tensors of shape (quantities,
entities); column i is always the i-th entity of the append-only entity list. The pulse is a
float64 tensor of shape (steps, columns) that names its columns itself. Everything else is JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

from gradscope.quantities import TableName

# 1: the first.
FORMAT_VERSION = 1

PLUGIN = "gradscope"
FILE_SUFFIX = ".gradscope"
# What TensorBoard looks for in a file's name.
FILE_PREFIX = "events.out.tfevents."

HEADER = "gradscope/header"
ENTITIES = "gradscope/entities"
PULSE = "gradscope/pulse"
PROBLEM = "gradscope/problem"
COVERAGE = "gradscope/coverage"
TABLES: dict[TableName, str] = {
    "parameters": "gradscope/parameters",
    "modules": "gradscope/modules",
    "signals": "gradscope/signals",
}

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


def _string_value(tag: str, text: str, plugin: str) -> Value:
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, tensor_shape=_shape([1]), string_val=[text.encode()]
    )
    return Value(tag=tag, tensor=tensor, metadata=_metadata(plugin))


def json_value(tag: str, content: Mapping[str, Any]) -> Value:
    """A record of JSON."""
    return _string_value(tag, json.dumps(content, allow_nan=False), PLUGIN)


def read_json(value: Value) -> dict[str, Any]:
    """The content of a JSON record."""
    content: dict[str, Any] = json.loads(value.tensor.string_val[0])
    return content


def pulse_value(columns: Sequence[str], rows: NDArray[np.float64]) -> Value:
    """The pulse of some steps: `rows` has a column per name, the first is the step."""
    return array_value(PULSE, rows, json.dumps(list(columns)).encode())


def read_pulse(value: Value) -> tuple[list[str], NDArray[np.float64]]:
    """The column names and the rows of a pulse record."""
    columns: list[str] = json.loads(value.metadata.plugin_data.content)
    return columns, read_array(value)


def text_value(tag: str, markdown: str) -> Value:
    """A text that TensorBoard's own text tab shows."""
    return _string_value(tag, markdown, "text")


def scalar_value(tag: str, number: float) -> Value:
    """A scalar that TensorBoard's own scalars tab shows."""
    return Value(tag=tag, simple_value=number)
