"""TensorBoard's own readers read our file, checksums and all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing import (
    data_provider,
    event_accumulator,
    event_file_loader,
    plugin_event_multiplexer,
)
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.context import RequestContext
from tensorboard.util import tensor_util

from gradscope.log.reader import load


def test_framing_is_valid_by_tensorboards_own_checksums(event_file: Path) -> None:
    reader = PyRecordReader_New(str(event_file))
    read = 0
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            break
        read += 1
    assert read == 13
    # The same reader does refuse a wrong checksum.
    damaged = bytearray(event_file.read_bytes())
    damaged[20] ^= 1
    event_file.write_bytes(damaged)
    with pytest.raises(errors.DataLossError):
        PyRecordReader_New(str(event_file)).GetNext()


def test_event_file_loader_yields_every_event(event_file: Path) -> None:
    events = list(event_file_loader.EventFileLoader(str(event_file)).Load())
    assert events[0].file_version == "brain.Event:2"
    tags = [value.tag for event in events for value in event.summary.value]
    assert tags.count("gradscope/parameters") == 4
    assert tags.count("training/loss") == 4
    assert all(event.wall_time > 0 for event in events)


def test_event_accumulator_has_scalars_and_tensors(small_run: Path) -> None:
    accumulator = event_accumulator.EventAccumulator(str(small_run), {"tensors": 0, "scalars": 0})
    accumulator.Reload()
    points = [(event.step, event.value) for event in accumulator.Scalars("training/loss")]
    assert points == [(step, pytest.approx(step / 10)) for step in range(4)]
    expected = load(small_run).parameters.values
    tensors = accumulator.Tensors("gradscope/parameters")
    assert [event.step for event in tensors] == [0, 1, 2, 3]
    for row, event in enumerate(tensors):
        array: Any = tensor_util.make_ndarray(event.tensor_proto)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[:, row, : array.shape[1]])


def test_data_provider_shows_them_to_plugins(small_run: Path) -> None:
    multiplexer = plugin_event_multiplexer.EventMultiplexer(
        tensor_size_guidance={"gradscope": 0, "scalars": 0}
    )
    multiplexer.AddRunsFromDirectory(str(small_run.parent))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(small_run.parent))
    context = RequestContext()
    scalars = provider.read_scalars(
        context, experiment_id="", plugin_name="scalars", downsample=100
    )["small"]["training/loss"]
    assert [(point.step, point.value) for point in scalars] == [
        (step, pytest.approx(step / 10)) for step in range(4)
    ]
    listed = provider.list_tensors(context, experiment_id="", plugin_name="gradscope")["small"]
    assert {
        "gradscope/header",
        "gradscope/entities",
        "gradscope/parameters",
        "gradscope/modules",
        "gradscope/signals",
        "gradscope/pulse",
        "gradscope/problem",
        "gradscope/histograms",
    } <= set(listed)
    tensors = provider.read_tensors(
        context, experiment_id="", plugin_name="gradscope", downsample=100
    )["small"]
    expected = load(small_run).modules.values
    for row, datum in enumerate(tensors["gradscope/modules"]):
        np.testing.assert_array_equal(datum.numpy, expected[:, row, : datum.numpy.shape[1]])
    # Records without a step of their own are not dropped for having the same.
    assert len(tensors["gradscope/entities"]) == 6
