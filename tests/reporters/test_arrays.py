"""The arrays of the page: no event gets lost, and numbers come back to three digits."""

import base64
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.reporters.html.arrays import columns, compressed, packed, quantiles


def unpacked(text: str) -> NDArray[np.float64]:
    """By the formula of floating point numbers: sign, exponent, ten bits of the fraction."""
    exponent, high, low = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(
        3, -1
    )
    fraction = (high.astype(np.float64) * 4 + (low >> 1)) / 1024
    sign = 1.0 - 2.0 * (low & 1)
    normal = (1 + fraction) * 2.0 ** (exponent.astype(np.float64) - 127)
    small = fraction * 2.0**-126
    number = sign * np.where(exponent == 0, small, normal)
    beyond = np.where(fraction == 0, sign * np.inf, np.nan)
    return np.asarray(np.where(exponent == 255, beyond, number))


@given(st.lists(st.floats(2.0**-126, 2.0**127, width=32), min_size=1))
def test_numbers_keep_the_precision_of_half_and_the_range_of_single(values: list[float]) -> None:
    given_ = np.array(values, np.float32)
    back = unpacked(packed(given_))
    # Half of the last of eleven bits.
    assert np.all(np.abs(back / given_.astype(np.float64) - 1) <= 2.0**-11)


def test_what_is_no_ordinary_number_comes_back_as_it_is() -> None:
    largest = float(np.finfo(np.float32).max)
    values = np.array([0.0, -1.5, np.inf, -np.inf, np.nan, 1e-45, largest], np.float32)
    back = unpacked(packed(values))
    assert back[:4].tolist() == [0.0, -1.5, np.inf, -np.inf]
    assert np.isnan(back[4])
    assert 0 <= back[5] < 2.0**-126
    assert np.isfinite(back[6])
    assert back[6] == pytest.approx(largest, rel=2.0**-10)


def test_a_nan_of_any_kind_stays_one() -> None:
    odd = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(unpacked(packed(odd))).all()


def test_bytes_are_compressed() -> None:
    zeros = np.zeros(100_000, np.uint8)
    assert len(compressed(zeros)) < 500
    assert zlib.decompress(base64.b64decode(compressed(zeros))) == bytes(100_000)


STEPS = np.arange(0, 2000, 1)


def test_columns_that_fit_are_the_steps() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    made = columns(values, np.zeros((4, 3), dtype=bool), STEPS[:4], 4, log=True)
    assert np.array_equal(made.values, values.T)
    assert made.first.tolist() == made.last.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("at", [0, 1, 777, 1999])
@pytest.mark.parametrize("event", [1e3, 1e-9, 0.0, np.inf])
def test_a_one_step_event_outlives_the_pooling(at: int, event: float) -> None:
    values = np.full((2000, 2), 0.1, np.float32)
    values[:, 1] = np.linspace(0.1, 0.2, 2000)
    values[at, 0] = event
    made = columns(values, np.zeros(values.shape, dtype=bool), STEPS, 300, log=True)
    assert made.values.shape[0] == 2
    assert made.values.shape[1] <= 300
    column = int(np.flatnonzero((made.first <= at) & (at <= made.last))[0])
    assert made.values[0, column] == np.float32(event)
    # Every other column, and the other row, hold what was there.
    others = np.delete(made.values[0], column)
    assert set(others.tolist()) == {np.float32(0.1)}
    assert np.isfinite(made.values[1]).all()


def test_columns_cover_every_step_once() -> None:
    values = np.ones((2000, 1), np.float32)
    made = columns(values, np.zeros((2000, 1), dtype=bool), STEPS * 7, 333, log=True)
    assert made.first[0] == 0
    assert made.last[-1] == 1999 * 7
    assert np.array_equal(made.first[1:], made.last[:-1] + 7)


def test_what_is_broken_is_infinite_and_what_was_not_measured_is_nan() -> None:
    values = np.array([[np.nan, 1.0], [2.0, 1.0]], np.float32)
    broken = np.array([[False, True], [False, False]])
    made = columns(values, broken, STEPS[:2], 10, log=True)
    assert np.array_equal(made.values, [[np.nan, 2.0], [np.inf, 1.0]], equal_nan=True)


def test_a_share_of_zero_is_no_event_where_the_scale_is_linear() -> None:
    values = np.zeros((8, 1), np.float32)
    values[3] = 0.9
    made = columns(values, np.zeros((8, 1), dtype=bool), STEPS[:8], 1, log=False)
    assert made.values.tolist() == [[pytest.approx(0.9)]]


def test_quantiles_are_those_of_what_was_measured() -> None:
    random = np.random.default_rng(3)
    values = np.exp(random.normal(0, 3, (50, 17))).astype(np.float32)
    values[random.random(values.shape) < 0.4] = np.nan
    values[7] = np.nan
    values[8] = [2.5, *[np.nan] * 16]
    shares = (0.05, 0.5, 0.9)
    found = quantiles(values, shares)
    measured = np.delete(np.arange(50), 7)
    for share, made in zip(shares, found, strict=True):
        assert np.isnan(made[7])
        truth = [
            np.quantile(row[~np.isnan(row)].astype(np.float64), share) for row in values[measured]
        ]
        assert made[measured] == pytest.approx(truth)
