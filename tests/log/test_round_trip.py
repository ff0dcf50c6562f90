"""What is written is what is read, for whatever numbers and names."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from gradscope.log import schema
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter
from gradscope.quantities import CATALOGUE, TableName
from gradscope.record import Entity, Run


@dataclass
class Step:
    """What one recorded step brings."""

    number: int
    new: dict[TableName, list[Entity]]
    tables: dict[TableName, NDArray[np.float32]]
    columns: list[str]
    pulse: NDArray[np.float64]


def test_an_older_version_did_not_measure_what_has_come_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setitem(CATALOGUE, "modules", CATALOGUE["modules"][:3])
        writer = RunWriter(tmp_path, {})
        writer.entities("modules", [Entity("layer", "module", (2,), 2, 0, "linear", "Linear")])
        tables = {name: np.zeros((len(known), 0), np.float32) for name, known in CATALOGUE.items()}
        tables["modules"] = np.array([[1.0], [2.0], [3.0]], np.float32)
        writer.step(0, tables, {}, None, None)
        writer.close()
    table = load(tmp_path).modules
    assert set(table.quantities) == {quantity.name for quantity in CATALOGUE["modules"]}
    assert table.values[:3].tolist() == [[[1.0]], [[2.0]], [[3.0]]]
    assert np.isnan(table.values[3:]).all()


names = st.text(max_size=12)
scalar_names = names.filter(
    lambda name: name not in {"step", "nonfinite", "loss_nonfinite", "grad_norm"}
)
any_float64 = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def entities(draw: st.DrawFn, prefix: str) -> Entity:
    return Entity(
        name=prefix + draw(names),
        kind=draw(st.sampled_from(["parameter", "module", "signal"])),
        shape=tuple(draw(st.lists(st.integers(0, 2**40), max_size=4))),
        numel=draw(st.integers(0, 2**60)),
        depth=draw(st.integers(0, 10**6)),
        group=draw(names),
        type=draw(names),
    )


@st.composite
def runs(draw: st.DrawFn) -> list[Step]:
    numbers = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True))
    counts = dict.fromkeys(CATALOGUE, 0)
    steps = []
    for number in sorted(numbers):
        new: dict[TableName, list[Entity]] = {}
        tables = {}
        for table, quantities in CATALOGUE.items():
            growth = draw(st.integers(0, 3))
            new[table] = [draw(entities(f"{counts[table] + i}.")) for i in range(growth)]
            counts[table] += growth
            shape = (len(quantities), counts[table])
            tables[table] = draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
        columns = draw(st.lists(scalar_names, max_size=4, unique=True))
        row = [float(number), *(draw(any_float64) for _ in columns)]
        steps.append(Step(number, new, tables, columns, np.array([row])))
    return steps


def written(steps: list[Step], folder: Path) -> Run:
    writer = RunWriter(folder, {"model": "Any"})
    for step in steps:
        for table, new in step.new.items():
            if new:
                writer.entities(table, new)
        writer.step(step.number, step.tables, {}, (["step", *step.columns], step.pulse))
    writer.close()
    return load(folder)


@settings(max_examples=150, deadline=None)
@given(runs())
def test_tables_and_entities(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = written(steps, Path(folder))
    assert run.meta["left_out"] == []
    for name in CATALOGUE:
        table = getattr(run, name)
        assert list(table.entities) == [entity for step in steps for entity in step.new[name]]
        assert list(table.steps) == [step.number for step in steps]
        for row, step in enumerate(steps):
            known = step.tables[name].shape[1]
            np.testing.assert_array_equal(table.values[:, row, :known], step.tables[name])
            assert np.isnan(table.values[:, row, known:]).all()


@settings(max_examples=100, deadline=None)
@given(runs())
def test_scalars(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = written(steps, Path(folder))
    assert list(run.steps) == [step.number for step in steps]
    for row, step in enumerate(steps):
        known = dict(zip(step.columns, step.pulse[0, 1:], strict=True))
        for name, values in run.scalars.items():
            if name not in {"nonfinite", "loss_nonfinite", "grad_norm"}:
                np.testing.assert_array_equal(values[row], known.get(name, np.nan))


def test_step_that_is_written_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.entities("parameters", [Entity("w", "parameter", (1,), 1, 0, "weight", "Linear")])
    for value in (1.0, 2.0):
        table = np.full((len(CATALOGUE["parameters"]), 1), value, np.float32)
        writer.step(7, {"parameters": table}, {}, (["step", "loss"], np.array([[7.0, value]])))
    writer.close()
    run = load(tmp_path)
    assert list(run.steps) == [7]
    assert run.parameters["grad_norm"].tolist() == [[2.0]]
    assert run.scalars["loss"].tolist() == [2.0]


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {"model": "Ünïcode ✓", "parameters": 2**50, "versions": {"torch": "2"}, "none": None}
    RunWriter(tmp_path, meta).close()
    run = load(tmp_path)
    assert {key: run.meta[key] for key in meta} == meta
    assert run.meta["log_dir"] == str(tmp_path)


def test_loaded_arrays_are_read_only(small_run: Path) -> None:
    run = load(small_run)
    arrays = [run.parameters.values, run.parameters.steps, run.steps, *run.scalars.values()]
    assert [array.flags.writeable for array in arrays] == [False] * len(arrays)


def test_what_an_older_gradscope_did_not_measure_is_nan(tmp_path: Path) -> None:
    older = CATALOGUE["parameters"][:5]
    rows = np.arange(5, dtype=np.float32)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CATALOGUE, "parameters", older)
        writer = RunWriter(tmp_path, {})
        writer.entities("parameters", [Entity("weight", "parameter", (1,), 1, 0, "weight", "")])
        writer.step(0, {"parameters": rows}, {}, None)
        writer.close()
    table = load(tmp_path).parameters
    assert set(table.quantities) == {quantity.name for quantity in CATALOGUE["parameters"]}
    for index, quantity in enumerate(older):
        assert table[quantity.name].tolist() == [[index]]
    assert np.isnan(table["update_lost_fraction"]).all()


def test_quantities_that_were_not_measured_of_anything_take_no_room() -> None:
    table = np.full((18, 3), np.nan, np.float32)
    table[4], table[9, 1] = [1.0, np.inf, np.nan], 2.0
    value = schema.table_value("parameters", table)
    assert len(value.tensor.tensor_content) == 2 * 3 * 4
    there, rows = schema.read_table(value, 18)
    assert there.tolist() == [4, 9]
    np.testing.assert_array_equal(rows, table[there])
    for whole in (np.full((18, 3), np.nan, np.float32), np.ones((18, 3), np.float32)):
        value = schema.table_value("parameters", whole)
        there, rows = schema.read_table(value, 18)
        assert there.tolist() == list(range(18))
        np.testing.assert_array_equal(rows, whole)
    for quantities in (9, 20):
        with pytest.raises(ValueError, match="quantities"):
            schema.read_table(schema.array_value("t", table), quantities)


@pytest.mark.parametrize(
    "columns",
    [
        ["step", "loss", "loss_nonfinite", "learning_rate"],
        ["step", "learning_rate", "loss", "loss_nonfinite"],
        ["step", "loss", "learning_rate", "accuracy"],
    ],
)
def test_a_pulse_keeps_the_names_of_its_columns(tmp_path: Path, columns: list[str]) -> None:
    numbers = np.arange(8.0).reshape(2, 4)
    if "loss_nonfinite" in columns:
        numbers[:, columns.index("loss_nonfinite")] = 0, 1
    writer = RunWriter(tmp_path, {})
    writer.step(0, {}, {}, (columns, numbers))
    writer.close()
    run = load(tmp_path)
    assert run.steps.tolist() == [0, 4]
    for name, column in zip(columns[1:], numbers.T[1:], strict=True):
        assert run.scalars[name].tolist() == column.tolist()
