"""The scalars for TensorBoard: their values by hand, and how many there can be."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from tensorboard.backend.event_processing import event_file_loader

from gradscope.log import scalars, schema
from gradscope.log.writer import RunWriter, run_files
from gradscope.quantities import CATALOGUE, TableName

Row = NDArray[np.float32]


def tables(**known: ArrayLike) -> dict[TableName, Row]:
    """One step's tables with these quantities; the others were not measured."""
    width = max(len(np.atleast_1d(np.asarray(values))) for values in known.values())
    made: dict[TableName, Row] = {}
    for name, listed in CATALOGUE.items():
        rows = [known.get(f"{name}__{q.name}", np.full(width, np.nan)) for q in listed]
        made[name] = np.array(rows, np.float32)
    return made


def test_spread_is_that_of_layers_that_there_are() -> None:
    # 40 layers: by the nearest rank 5 % is the second smallest and 95 % the third largest.
    norms = np.arange(1, 41, dtype=np.float32) ** 2
    shuffled = np.random.default_rng(0).permutation(norms)
    found = scalars.table_scalars(tables(parameters__grad_norm=[np.nan, *shuffled]))
    group = "gradient_norm_by_layer"
    assert {tag: value for tag, value in found.items() if tag.startswith(group)} == {
        f"{group}/smallest": 1.0,
        f"{group}/5th_percentile": 4.0,
        f"{group}/median": (20**2 + 21**2) / 2,
        f"{group}/95th_percentile": 38.0**2,
        f"{group}/largest": 1600.0,
    }
    assert found["gradient/global_norm"] == pytest.approx(
        math.sqrt(sum(k**4 for k in range(1, 41)))
    )


def test_shares_and_update_ratios() -> None:
    found = scalars.table_scalars(
        tables(
            parameters__update_ratio=[1e-3, np.nan, 3e-3],
            modules__dead_unit_fraction=[0.0, 0.5, np.nan],
            modules__output_saturated_fraction=[np.nan, 0.25, 0.75],
            modules__output_rms=[1.0, 2.0, 3.0],
        )
    )
    assert found == pytest.approx(
        {
            "update_ratio_by_layer/smallest": 1e-3,
            "update_ratio_by_layer/5th_percentile": 1e-3,
            "update_ratio_by_layer/median": 2e-3,
            "update_ratio_by_layer/95th_percentile": 3e-3,
            "update_ratio_by_layer/largest": 3e-3,
            "activation/dead_share_mean": 0.25,
            "activation/dead_share_largest": 0.5,
            "activation/saturated_share_mean": 0.5,
            "activation/saturated_share_largest": 0.75,
            "activation/largest_rms": 3.0,
        }
    )


def test_what_is_infinite_or_broken_stays_so_without_a_warning() -> None:
    broken = tables(
        parameters__grad_norm=[1.0, np.inf, np.inf], parameters__grad_nonfinite=[0, 0, 7]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scalars.table_scalars(broken)
        layers = scalars.layer_scalars(broken["parameters"], {"a": 0, "b": 1, "c": 2})
    assert found["gradient_norm_by_layer/5th_percentile"] == 1.0
    assert found["gradient_norm_by_layer/95th_percentile"] == math.inf
    assert found["gradient/nonfinite_entries"] == 7
    assert math.isnan(found["gradient/global_norm"])
    assert layers["layer/a/grad_norm"] == 1.0
    assert layers["layer/b/grad_norm"] == math.inf
    # The norm of what is left beside NaN is not the gradient's.
    assert math.isnan(layers["layer/c/grad_norm"])
    # Not measured: no point.
    assert set(layers) == {f"layer/{name}/grad_norm" for name in "abc"}


def test_pulses_have_the_latest_value_under_their_tags() -> None:
    pulses = [
        {"loss": 3.0, "loss_nonfinite": 0.0, "mine": 1.0},
        {"loss": 2.0, "loss_scale": 1024.0, "grad_norm_before_clip": 9.0, "other": 5.0},
    ]
    assert scalars.pulse_scalars(pulses, {"mine"}) == {
        "training/loss": 2.0,
        "training/loss_scale": 1024.0,
        "gradient/norm_before_clip": 9.0,
        "user/mine": 1.0,
    }


def test_all_tags_there_can_be_are_no_more_than_forty() -> None:
    everything = tables(
        **{f"{name}__{q.name}": [1.0, 0.5] for name, listed in CATALOGUE.items() for q in listed}
    )
    names = ("loss", "learning_rate", "loss_scale", "skipped", "grad_norm_before_clip", "clipped")
    pulse = dict.fromkeys(names, 1.0)
    found = scalars.pulse_scalars([pulse], ()) | scalars.table_scalars(everything)
    constants = [value for value in vars(schema).values() if isinstance(value, str)]
    own = {value for value in constants if value.startswith("gradscope/")}
    own |= set(schema.TABLES.values()) | {"gradscope/heatmap", "gradscope/gradient_by_depth"}
    assert len(found) == 24
    assert {"gradscope/header", "gradscope/findings", "gradscope/parameters"} <= own
    # And the layout of the custom scalars.
    assert len(found) + len(own) + 1 <= 40


def shown(folder: Path, value: schema.Value) -> schema.Value:
    """The value as TensorBoard's loader hands it to its plugins."""
    writer = RunWriter(folder, {})
    writer.show(3, [value])
    writer.close()
    (path,) = run_files(folder)
    *_, event = event_file_loader.EventFileLoader(str(path)).Load()
    assert event.step == 3
    (read,) = event.summary.value
    return read


def test_histogram_keeps_its_edges_and_counts(tmp_path: Path) -> None:
    from tensorboard.util import tensor_util

    edges = np.array([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0])
    counts = np.array([0, 5, 0, 2, 0], np.uint32)
    value = schema.histogram_value("log10_gradient/a", edges, counts)
    # Σ count × center, and of the squares.
    assert value.histo.sum == 5 * -2.5 + 2 * -0.5
    assert value.histo.sum_squares == 5 * 6.25 + 2 * 0.25
    assert value.histo.num == 7
    read = shown(tmp_path, value)
    assert read.metadata.plugin_data.plugin_name == "histograms"
    buckets = tensor_util.make_ndarray(read.tensor).tolist()
    assert buckets == [[-3.0, -2.0, 5.0], [-2.0, -1.0, 0.0], [-1.0, 0.0, 2.0]]


def test_histogram_of_a_single_bin_has_its_width(tmp_path: Path) -> None:
    from tensorboard.util import tensor_util

    value = schema.histogram_value("h", np.array([0.0, 1.0, 2.0]), np.array([0, 9], np.uint32))
    buckets = tensor_util.make_ndarray(shown(tmp_path, value).tensor).tolist()
    assert buckets == [[1.0, 2.0, 9.0]]


def test_layout_names_tags_that_exist(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    read = shown(tmp_path, scalars.margin_layout())
    assert read.metadata.plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout.FromString(read.tensor.string_val[0])
    (category,) = layout.category
    loss, gradient, update = category.chart
    assert list(loss.multiline.tag) == ["^training/loss$"]
    exist = scalars.table_scalars(
        tables(parameters__grad_norm=[1.0], parameters__update_ratio=[1.0])
    )
    for chart, group in ((gradient, "gradient_norm"), (update, "update_ratio")):
        (series,) = chart.margin.series
        assert (series.lower, series.value, series.upper) == (
            f"{group}_by_layer/5th_percentile",
            f"{group}_by_layer/median",
            f"{group}_by_layer/95th_percentile",
        )
        assert {series.lower, series.value, series.upper} <= set(exist)
