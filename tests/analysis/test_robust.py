"""Statistics where little or nothing was measured."""

import numpy as np
import pytest

from gradscope.analysis.robust import at_first, at_last, median, noise


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_of_nothing_there_is_no_median(rows: int, columns: int) -> None:
    values = np.empty((rows, columns))
    assert median(values, axis=0).shape == (columns,)
    assert np.isnan(median(values, axis=0)).all()
    assert np.isnan(median(values, axis=1)).all()


def test_first_and_last_are_those_that_were_measured() -> None:
    nan = np.nan
    values = np.array([[nan, 1.0, nan], [2.0, nan, nan], [3.0, 4.0, nan], [nan, 5.0, nan]])
    assert at_first(values).tolist()[:2] == [2.0, 1.0]
    assert at_last(values)[0].tolist()[:2] == [3.0, 5.0]
    assert np.isnan([at_first(values)[2], at_last(values)[0, 2]]).all()
    assert np.isnan(at_first(values[:0])).all()


def test_noise_is_without_the_trend() -> None:
    draw = np.random.default_rng(0)
    flat = draw.normal(0, 0.5, 20_000)
    assert noise(flat) == pytest.approx(0.5, rel=0.03)
    assert noise(flat + 3 * np.arange(20_000)) == pytest.approx(noise(flat))
