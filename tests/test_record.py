"""Tables as DataFrames; copies of runs and reports."""

import copy
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradscope.analysis.analyzer import analyze
from gradscope.errors import ConfigError
from gradscope.record import Histograms, Run, Table, check_counts, pack_counts, unpack_counts
from tests.analysis.synthetic import Chain
from tests.reporters.samples import empty_run, parameter, table

NORMS = np.array([[1, 2, 3], [4, np.nan, 6]], np.float32)


@pytest.fixture
def measured() -> Table:
    entities = [parameter("a", 0), parameter("b", 1), parameter("c", 2, "bias")]
    return table("parameters", entities, (0, 10), grad_norm=NORMS)


def test_a_tidy_frame_has_a_row_per_step_and_entity(measured: Table) -> None:
    frame = measured.frame()
    assert frame["step"].tolist() == [0, 0, 0, 10, 10, 10]
    assert frame["name"].tolist() == ["a", "b", "c"] * 2
    assert frame["group"].tolist() == ["weight", "weight", "bias"] * 2
    np.testing.assert_array_equal(frame["grad_norm"].to_numpy(), NORMS.ravel())
    assert frame["weight_norm"].isna().all()


def test_a_wide_frame_has_a_row_per_step_and_a_column_per_entity(measured: Table) -> None:
    frame = measured.frame("grad_norm")
    assert (frame.index.name, frame.columns.name) == ("step", "name")
    assert frame.index.tolist() == [0, 10]
    assert frame.columns.tolist() == ["a", "b", "c"]
    assert frame.loc[10, "c"] == 6
    np.testing.assert_array_equal(frame.to_numpy(), NORMS)


def test_a_frame_is_the_users_own(measured: Table) -> None:
    frame = measured.frame("grad_norm")
    frame.loc[0, "a"] = -1
    assert measured["grad_norm"][0, 0] == 1


def test_an_unknown_quantity_names_the_nearest(measured: Table) -> None:
    with pytest.raises(ConfigError, match=r"no quantity 'grad_nrom'.*did you mean 'grad_norm'"):
        measured.frame("grad_nrom")


def test_the_frame_of_nothing() -> None:
    assert empty_run().parameters.frame("grad_norm").shape == (0, 0)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  (its own)


copied = pytest.mark.parametrize("again", [through_pickle, copy.deepcopy, copy.copy])


@copied
def test_a_copy_of_a_run_is_the_run(again: Callable[[Run], Run]) -> None:
    steps = np.array([0, 10], np.int64)
    run = Chain(steps=2, meta={"left_out": ["a record"]}).run()
    counted = Histograms(run.parameters.entities[:1], steps, -3, 4, (b"a", b"b"))
    run = Run(run.parameters, run.modules, run.signals, steps, dict(run.scalars), run.meta, counted)
    twin = again(run)
    assert dict(twin.meta) == dict(run.meta)
    assert twin.scalars.keys() == run.scalars.keys()
    for name, values in run.scalars.items():
        np.testing.assert_array_equal(twin.scalars[name], values)
    for one, other in (
        (run.parameters, twin.parameters),
        (run.modules, twin.modules),
        (run.signals, twin.signals),
    ):
        assert (one.entities, one.quantities) == (other.entities, other.quantities)
        np.testing.assert_array_equal(one.values, other.values)
    assert twin.histograms.packed == counted.packed
    # It can be changed no more than the original.
    for array in (twin.steps, twin.scalars["loss"], twin.parameters.values, twin.histograms.steps):
        assert not array.flags.writeable
    with pytest.raises(TypeError):
        twin.meta["model"] = "another"  # type: ignore[index]


@copied
def test_a_copy_of_a_report_says_the_same(again: Callable[[Any], Any]) -> None:
    run = Chain(factor=0.15, activation="Sigmoid", loss=(2.31, 2.305)).run()
    report = analyze(run, limits={"GS101": {"decay": 1e-4}})
    twin = again(report)
    assert report.findings
    assert twin.findings == report.findings
    assert twin.skipped == report.skipped
    assert twin.rules == report.rules
    # With its rules it can be asked again.
    assert analyze(twin.run, rules=twin.rules).findings == report.findings


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_checked_as_they_are_unpacked(seed: int) -> None:
    """A damaged array that can't be unpacked is refused; a whole one is not."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 3, (5, 12), dtype=np.uint32)
    counts[:, : 3 * seed] = 0
    if seed % 2:
        counts[0, 11] = 1 << 20
    packed = pack_counts(counts)
    check_counts(packed, 12)
    damaged = [packed[:length] for length in range(len(packed))]
    damaged += [packed + bytes(extra) for extra in range(1, 5)]
    for at in range(len(packed)):
        changed = bytearray(packed)
        changed[at] ^= 1 << int(generator.integers(8))
        damaged.append(bytes(changed))
    for candidate in damaged:
        for bins in (12, 10):
            assert _raised(check_counts, candidate, bins) or not _raised(
                unpack_counts, candidate, bins
            )


def _raised(read: Callable[[bytes, int], object], packed: bytes, bins: int) -> bool:
    try:
        read(packed, bins)
    except (ValueError, IndexError, TypeError, zlib.error):
        return True
    return False
