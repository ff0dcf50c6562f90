"""Statistics where there is no float64, against numpy in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from gradscope.capture import single_precision, statistics
from gradscope.capture.condensed import Row, condensed
from gradscope.capture.derive import What
from gradscope.capture.precision import has_float64
from gradscope.capture.widening import widened
from tests.capture.tensors import CASES, F64, entries, normal
from tests.setups.without_float64 import no_float64


def on_host(what: What, row: Tensor) -> F64:
    assert row.dtype == torch.float32
    found: NDArray[np.float64] = widened(what, row.numpy().astype(np.float64)[None])[0]
    return found


def described(entries: F64) -> list[float]:
    """Count, mean, standard deviation, rms, least, largest, zeros, non-finite."""
    known = entries[np.isfinite(entries)]
    rest = [float((entries == 0).sum()), float((~np.isfinite(entries)).sum())]
    if not known.size:
        return [0.0, np.nan, np.nan, np.nan, np.inf, -np.inf, *rest]
    rms = np.sqrt((known**2).mean())
    return [known.size, known.mean(), known.std(), rms, known.min(), known.max(), *rest]


def read(moments: F64) -> list[float]:
    """The same, of the moments as `derive` knows them."""
    count, total, square, low, high, zeros, nonfinite = moments
    with np.errstate(invalid="ignore"):
        mean, square = np.float64(total) / count, np.float64(square) / count
    spread = np.sqrt(np.maximum(square - mean**2, 0.0))
    return [count, mean, spread, np.sqrt(square), low, high, zeros, nonfinite]


def assert_close(found: Sequence[float], expected: Sequence[float]) -> None:
    # A mean far below the spread is a rounding error of the sums, and the other way round.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * np.nan_to_num(expected[3]))


@pytest.mark.parametrize("name", CASES)
def test_moments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, before = CASES[name], entries(CASES[name]).copy()
    expected = described(entries(tensor))
    for piece in (1_048_576, max(7, tensor.numel() // 40)):
        monkeypatch.setattr(single_precision, "_PIECE", piece)
        with no_float64():
            row = statistics.moments(tensor)
        assert_close(read(on_host("gradient", row)), expected)
    np.testing.assert_array_equal(entries(tensor), before)


def test_spread_far_below_the_mean_is_right_where_float32_sums_are_not() -> None:
    x = CASES["many far from zero"]
    spread = entries(x).std()
    with no_float64():
        row = on_host("output", statistics.moments(x))
    assert read(row)[2] == pytest.approx(spread, rel=1e-5)
    naive = torch.sqrt((x.square().mean() - x.mean().square()).clamp_min(0))
    assert abs(float(naive) / spread - 1) > 1e-3


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32)),
    st.integers(1, 70),
)
def test_moments_of_anything(values: NDArray[np.float32], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch, no_float64():
        patch.setattr(single_precision, "_PIECE", piece)
        row = statistics.moments(torch.from_numpy(values.copy()))
    assert_close(read(on_host("gradient", row)), described(values.astype(np.float64)))


@pytest.mark.parametrize("absent", [0, 38])
@pytest.mark.parametrize("values", [[], [1e20, -3e20], [2.0, torch.nan]], ids=str)
def test_sparse_gradient_counts_what_it_leaves_out(values: list[float], absent: int) -> None:
    places = torch.arange(len(values))[None]
    size = len(values) + absent
    tensor = torch.sparse_coo_tensor(places, torch.tensor(values), (size,), check_invariants=False)
    expected = described(np.append(np.array(values, np.float32).astype(np.float64), [0.0] * absent))
    with no_float64():
        row = statistics.moments(tensor)
    assert_close(read(on_host("gradient", row)), expected)


@pytest.mark.parametrize("scale", [1000.0, 65536.0, 2.0**100, 1e-3, 1.0])
@pytest.mark.parametrize("name", ["normal", "huge", "tiny", "huge and not finite", "zeros"])
def test_moments_without_the_loss_scale(name: str, scale: float) -> None:
    tensor = CASES[name]
    with no_float64():
        row = single_precision.divided(statistics.moments(tensor), torch.tensor(scale))
    expected = described(entries(tensor) / float(np.float32(scale)))
    # Zeros of the quotient are those of the tensor.
    expected[6] = float((entries(tensor) == 0).sum())
    assert_close(read(on_host("gradient", row)), expected)


@pytest.mark.parametrize("name", [name for name, x in CASES.items() if x.is_floating_point()])
def test_squares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = CASES[name]
    known = entries(tensor)[np.isfinite(entries(tensor))]
    for piece in (1_048_576, max(7, tensor.numel() // 40)):
        monkeypatch.setattr(single_precision, "_PIECE", piece)
        with no_float64():
            row = statistics.squares(tensor)
        expected = [(known**2).sum(), known.size]
        np.testing.assert_allclose(on_host("weight", row), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e20, 1e-25, 1e-35])
def test_update_products(size: float) -> None:
    before, gradient = normal(2000), normal(2001)[:2000] * size
    after = before - 0.01 * normal(2002)[:2000]
    gradient[:3], after[3:5] = torch.tensor([torch.nan, torch.inf, 0.0]), torch.nan
    # Left as they were: some with a gradient, some without.
    after[100:150], gradient[140:160] = before[100:150], 0.0
    change, wide = entries(after) - entries(before), entries(gradient)
    kept = np.isfinite(change) & np.isfinite(wide)
    change, wide = change[kept], wide[kept]
    expected = [
        change @ change,
        wide @ change,
        wide @ wide,
        kept.sum(),
        (wide != 0).sum(),
        ((wide != 0) & (change == 0)).sum(),
    ]
    with no_float64():
        row = statistics.update_products(before, after, gradient)
    np.testing.assert_allclose(on_host("update", row), expected, rtol=1e-5)
    # The way of other devices.
    assert has_float64(torch.device("cpu"))
    row = statistics.update_products(before, after, gradient)
    np.testing.assert_allclose(row.numpy(), expected, rtol=1e-12)


def test_device_is_asked_what_it_has() -> None:
    has_float64.cache_clear()
    assert has_float64(torch.device("cpu"))
    with no_float64() as refused:
        assert not has_float64(torch.device("cpu"))
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3).to(torch.float64)
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64)
        assert len(refused) == 2
        refused.clear()
    assert has_float64(torch.device("cpu"))


@pytest.mark.parametrize("sizes", [(1.0, 3.0), (1e20, 1e-20), (1e-25, 2e-25), (0.0, 1e-30)])
def test_moments_are_added_up_where_they_are(sizes: tuple[float, float]) -> None:
    # Two entities, of each three tensors; one of them holds nothing.
    parts = [
        [normal(500, mean=2.0) * sizes[0], normal(700) * sizes[1], torch.zeros(0)],
        [normal(300) * sizes[1], torch.tensor([torch.nan, 1.0]), normal(200) * sizes[0]],
    ]
    with no_float64():
        rows: list[Row] = [
            ("output", entity, statistics.moments(tensor), ())
            for entity, tensors in enumerate(parts)
            for tensor in tensors
        ]
        added = condensed(rows)
    assert [entity for _, entity, _, _ in added] == [0, 1]
    for (_, _, row, _), tensors in zip(added, parts, strict=True):
        assert_close(read(on_host("output", row)), described(entries(torch.cat(tensors))))
