"""Of a run that is too long for the memory at hand a part is read, and it says so."""

from pathlib import Path

import numpy as np
import pytest

from gradscope.log.reader import load, load_part
from gradscope.log.writer import RunWriter, run_files
from gradscope.quantities import CATALOGUE
from gradscope.record import Entity, Run

ENTITIES, RECORDED, EVERY = 20, 400, 5
COLUMNS = ["step", "loss", "loss_nonfinite", "learning_rate"]


def pulse(first: int, behind: int, broken: range) -> np.ndarray:
    steps = np.arange(first, behind)
    bad = np.isin(steps, broken)
    return np.stack(
        [steps, np.where(bad, np.nan, steps / 10), bad, np.full(len(steps), 0.1)], axis=1
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Each fifth of 2000 steps is recorded; of it all quantities are its number."""
    broken = range(1_003, 1_100)
    writer = RunWriter(tmp_path, {"loss_is_progress": True})
    entities = [
        Entity(f"{i}", "parameter", (2,), 2, i, "weight", "Linear") for i in range(ENTITIES)
    ]
    writer.entities("parameters", entities)
    for number in range(RECORDED):
        step = number * EVERY
        tables = {
            table: np.full(
                (len(listed), ENTITIES if table == "parameters" else 0), step, np.float32
            )
            for table, listed in CATALOGUE.items()
        }
        counts = np.full((ENTITIES, 8), number, np.uint32)
        first = step - EVERY + 1 if number else 0
        rows = (COLUMNS, pulse(first, step + 1, broken))
        # As it stood, then complete.
        writer.step(step, tables, {}, rows, (-4, {"grad": counts}))
        writer.step(step, tables, {}, rows, (-4, {"grad": counts}))
    writer.step(step + 3, {}, {}, (COLUMNS, pulse(step, step + 4, broken)))
    writer.close()
    return tmp_path


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in run_files(folder))


def held(run: Run) -> int:
    tables = (run.parameters, run.modules, run.signals)
    arrays = [table.values for table in tables] + list(run.scalars.values())
    return sum(array.nbytes for array in arrays) + sum(map(len, run.histograms.packed))


def test_a_part_is_evenly_chosen(written: Path) -> None:
    whole, part = load(written), load_part(written, size(written) // 10 + 1)
    assert len(whole.recorded_steps) == RECORDED
    assert whole.steps.tolist() == list(range(RECORDED * EVERY - 1))
    # The first ten, each tenth, the last ten.
    numbers = {*range(10), *range(0, RECORDED, 10), *range(RECORDED - 10, RECORDED)}
    assert part.recorded_steps.tolist() == [number * EVERY for number in sorted(numbers)]
    assert part.histograms.steps.tolist() == part.recorded_steps.tolist()
    assert part.parameters.names == whole.parameters.names
    for name in part.parameters.quantities:
        assert (part.parameters[name] == part.recorded_steps[:, None]).all()
    at = np.searchsorted(whole.steps, part.steps)
    for name in COLUMNS[1:]:
        np.testing.assert_array_equal(part.scalars[name], whole.scalars[name][at])
    assert held(part) < held(whole) / 5


def test_what_is_at_the_end_and_where_the_loss_breaks_stays(written: Path) -> None:
    part = load_part(written, size(written) // 100)
    broken = part.steps[part.scalars["loss_nonfinite"] > 0]
    assert broken[0] == 1_003
    assert 1_100 in part.steps
    assert part.steps[-1] == RECORDED * EVERY - 2
    assert not np.isnan(part.scalars["loss"][part.scalars["loss_nonfinite"] == 0]).any()


def test_it_says_so(written: Path) -> None:
    (said,) = load_part(written, size(written) // 10 + 1).meta["left_out"]
    assert "each 10th step" in said
    assert load(written).meta["left_out"] == []


def test_of_a_run_that_fits_all_is_read(written: Path) -> None:
    whole, same = load(written), load_part(written, size(written))
    assert same.meta == whole.meta
    np.testing.assert_array_equal(same.parameters.values, whole.parameters.values)
    np.testing.assert_array_equal(same.steps, whole.steps)
