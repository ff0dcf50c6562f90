"""Histograms in the log: what is written is what is read, and what is broken is left out."""

import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard.compat.proto import event_pb2, summary_pb2

from gradscope.errors import ConfigError
from gradscope.log import framing, schema
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter, run_files
from gradscope.quantities import CATALOGUE
from gradscope.record import CountArray, Entity, Run, pack_counts, unpack_counts
from tests.log.conftest import LOWEST, counts, entity

any_counts = hnp.arrays(
    np.uint32, st.tuples(st.integers(0, 5), st.just(128)), elements=st.integers(0, 2**32 - 1)
)


def written(folder: Path, steps: dict[int, CountArray], lowest: int = -112) -> Run:
    """A run of these counts; the parameters are announced as they come."""
    writer = RunWriter(folder, {})
    known = 0
    for step, rows in steps.items():
        new = [entity(f"p{index}", index) for index in range(known, len(rows))]
        if new:
            writer.entities("parameters", new)
        known = max(known, len(rows))
        writer.step(step, {}, {}, None, (lowest, {"grad": rows}))
    writer.close()
    return load(folder)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 2**40), any_counts, min_size=1, max_size=5))
def test_what_is_written_is_what_is_read(steps: dict[int, CountArray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = written(Path(folder), steps)
    assert run.meta["left_out"] == []
    assert run.histograms.steps.tolist() == sorted(steps)
    assert run.histograms.edges.tolist() == list(range(-112, 17))
    size = max(len(rows) for rows in steps.values())
    assert run.histograms.names == tuple(f"p{index}" for index in range(size))
    for index, step in enumerate(sorted(steps)):
        known = len(steps[step])
        found = run.histograms.at(index)
        assert found.shape == (size, 128)
        np.testing.assert_array_equal(found[:known], steps[step])
        # Those that came later have no entries yet.
        assert not found[known:].any()
        for row in range(known):
            np.testing.assert_array_equal(run.histograms[f"p{row}"][index], steps[step][row])


def test_unknown_name_is_an_error_with_a_hint(small_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"parameters\.3.*did you mean 'parameters\."):
        load(small_run).histograms["parameters.3"]


def test_step_that_is_written_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.entities("parameters", [entity("w")])
    for seed in (1, 2):
        writer.step(7, {}, {}, None, (LOWEST, {"grad": counts(seed, 1)}))
    writer.close()
    run = load(tmp_path)
    assert run.histograms.steps.tolist() == [7]
    assert run.histograms["w"].tolist() == [[200, 201, 202, 203]]


def test_log_without_histograms_has_none(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.entities("parameters", [entity("w")])
    table = np.ones((len(CATALOGUE["parameters"]), 1), np.float32)
    writer.step(0, {"parameters": table}, {}, None)
    writer.close()
    run = load(tmp_path)
    assert not run.histograms
    assert run.recorded_steps.tolist() == [0]
    assert run.meta["left_out"] == []


def test_lost_entities_do_not_shift_the_names(tmp_path: Path) -> None:
    def entities(name: str, at: int) -> bytes:
        content = {"table": "parameters", "first": at, "entities": [_fields(entity(name, at))]}
        return _record(9, schema.json_value(schema.ENTITIES, content))

    rows = counts(0, 3)
    RunWriter(tmp_path, {}).close()
    (file,) = run_files(tmp_path)
    # Of three parameters the second was lost.
    records = [entities("a", 0), entities("c", 2), _record(5, schema.counts_value(LOWEST, rows))]
    with file.open("ab") as log:
        log.write(b"".join(records))
    run = load(tmp_path)
    assert run.histograms.names == ("a", "c") == run.parameters.names
    assert run.histograms["a"].tolist() == [rows[0].tolist()]
    assert run.histograms["c"].tolist() == [rows[2].tolist()]


def test_counts_of_unknown_parameters_are_passed_over(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.entities("parameters", [entity("w")])
    writer.step(0, {}, {}, None, (LOWEST, {"grad": counts(0, 3)}))
    writer.close()
    assert load(tmp_path).histograms.at(0).tolist() == [[0, 1, 2, 3]]


def _no_bins() -> schema.Value:
    value = schema.counts_value(LOWEST, counts(0, 1))
    value.metadata.plugin_data.content = b"{}"
    return value


def _bytes(packed: bytes) -> schema.Value:
    value = schema.counts_value(LOWEST, counts(0, 1))
    value.tensor.string_val[0] = packed
    return value


def _nothing() -> schema.Value:
    value = schema.counts_value(LOWEST, counts(0, 1))
    del value.tensor.string_val[:]
    return value


_WHOLE = schema.counts_value(LOWEST, counts(0, 2)).tensor.string_val[0]

BROKEN = {
    "not compressed": _bytes(b"counts"),
    "cut": _bytes(_WHOLE[:-6]),
    "cut within its head": _bytes(_WHOLE[:5]),
    "fewer rows than it says": _bytes(_WHOLE[:1] + (3).to_bytes(4, "little") + _WHOLE[5:]),
    "a part of a row, as once written": _bytes(zlib.compress(np.ones(3, "<u4").tobytes())),
    "no bins": _no_bins(),
    "no string": _nothing(),
    "other bins": schema.counts_value(LOWEST, np.ones((2, 8), np.uint32)),
    "from elsewhere on": schema.counts_value(LOWEST + 1, counts(0, 2)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record_is_left_out(name: str, small_run: Path) -> None:
    whole = load(small_run)
    (file,) = run_files(small_run)
    with file.open("ab") as log:
        log.write(_record(3, BROKEN[name]))
    run = load(small_run)
    assert len(run.meta["left_out"]) == 1
    assert run.histograms.steps.tolist() == [0, 1, 2, 3]
    assert [run.histograms.at(i).tolist() for i in range(4)] == [
        whole.histograms.at(i).tolist() for i in range(4)
    ]


def _record(step: int, value: schema.Value) -> bytes:
    summary = summary_pb2.Summary(value=[value])
    return framing.frame(event_pb2.Event(step=step, summary=summary).SerializeToString())


def _fields(described: Entity) -> dict[str, object]:
    return {name: getattr(described, name) for name in Entity.__slots__}


def test_counts_survive_packing_in_either_way() -> None:
    generator = np.random.default_rng(0)
    dense = generator.integers(0, 2**32, (5, 128), np.uint32)
    middle = np.zeros((5, 128), np.uint32)
    middle[2, 40:60] = 7
    for counts_ in (
        dense,
        middle,
        middle * 9_999,
        np.zeros((3, 128), np.uint32),
        np.zeros((0, 128), np.uint32),
    ):
        np.testing.assert_array_equal(unpack_counts(pack_counts(counts_), 128), counts_)
        np.testing.assert_array_equal(unpack_counts(zlib.compress(counts_.tobytes()), 128), counts_)
