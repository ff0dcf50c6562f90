"""Tables as DataFrames."""

import numpy as np
import pytest

from gradscope.errors import ConfigError
from gradscope.record import Table
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
