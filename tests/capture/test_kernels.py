"""What reads whole tensors, each way that there is, against numpy in float64.

Where there is no float64: `test_single_precision`. Octaves by bits: `test_histograms`.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from gradscope.capture import derive, host, statistics
from tests.capture.tensors import CASES, F64, WIDE, entries, normal

TENSORS = CASES | WIDE

# Sums of a few thousand entries of float32, added up in float64.
SINGLE = 1e-6
DOUBLE = 1e-12

Way: TypeAlias = Callable[[pytest.MonkeyPatch, Tensor], None]


def as_it_is(patch: pytest.MonkeyPatch, tensor: Tensor) -> None:
    del patch, tensor


def in_pieces(patch: pytest.MonkeyPatch, tensor: Tensor) -> None:
    """None is so small that it is read at once, and few pieces are full."""
    piece = max(7, tensor.numel() // 40)
    patch.setattr(host, "SMALL", 0)
    patch.setattr(host, "_PIECE", piece)


def as_devices_do(patch: pytest.MonkeyPatch, tensor: Tensor) -> None:
    patch.setattr(statistics, "_is_at_hand", lambda _: False)
    patch.setattr(statistics, "_LARGE_CHUNK", max(7, tensor.numel() // 3))


ways = pytest.mark.parametrize("way", [as_it_is, in_pieces, as_devices_do])
tensors = pytest.mark.parametrize("name", TENSORS)


def known(tensor: Tensor) -> F64:
    found = entries(tensor)
    return found[np.isfinite(found)]


def exactly(terms: F64) -> float:
    return float(terms.sum(dtype=np.longdouble))


def assert_moments(row: F64, tensor: Tensor, *, exact: bool = False) -> None:
    some, every = known(tensor), entries(tensor)
    count, total, square, low, high, zeros, nonfinite = row
    assert (count, zeros, nonfinite) == (some.size, (every == 0).sum(), every.size - some.size)
    assert (low, high) == (some.min(initial=np.inf), some.max(initial=-np.inf))
    # Where terms cancel, what is left of the sum is as wrong as they are.
    around = (DOUBLE if exact else SINGLE) * np.abs(some).sum()
    assert total == pytest.approx(exactly(some), abs=around)
    around = DOUBLE if exact else SINGLE
    assert square == pytest.approx(exactly(some**2), rel=around, abs=0)
    if some.size:
        # As `derive` has it: what spreads far less than the mean is still there.
        column = derive._described("", ([0], row[None]))["std"][1][0]
        allowed = 1e-4 * some.std() + 3e-8 * np.abs(some).max() * (low != high)
        assert column == pytest.approx(some.std(), abs=allowed)


@ways
@tensors
def test_moments(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = TENSORS[name]
    before = entries(tensor).copy()
    way(monkeypatch, tensor)
    row = statistics.moments(tensor)
    assert row.dtype == torch.float64
    assert_moments(row.numpy(), tensor, exact=way is as_devices_do)
    np.testing.assert_array_equal(entries(tensor), before)


@ways
@tensors
def test_squares(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = TENSORS[name]
    way(monkeypatch, tensor)
    some = known(tensor)
    tolerance = DOUBLE if way is as_devices_do else SINGLE
    square, count = statistics.squares(tensor).numpy()
    assert square == pytest.approx(exactly(some**2), rel=tolerance, abs=0)
    assert count == some.size


def test_many_at_once_in_any_order() -> None:
    some = list(TENSORS.values())
    for given_ones in (some, some[::-1], some[:1], []):
        rows = statistics.moments_of(given_ones)
        squares = statistics.squares_of(given_ones)
        for tensor, row, square in zip(given_ones, rows, squares, strict=True):
            assert_moments(row.numpy(), tensor)
            expected = [exactly(known(tensor) ** 2), known(tensor).size]
            np.testing.assert_allclose(square.numpy(), expected, rtol=SINGLE, atol=0)


def test_batches_end_where_the_cache_does(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [normal(size) for size in range(1, 200)] + [torch.tensor([torch.inf, 2.0])]
    for piece in (1, 100, 5000):
        monkeypatch.setattr(host, "_TOGETHER", piece)
        for tensor, row in zip(some, statistics.moments_of(some), strict=True):
            assert_moments(row.numpy(), tensor, exact=True)


any_floats = hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32))


@settings(max_examples=300, deadline=None)
@given(any_floats, st.sampled_from([1, 7, 70]), st.booleans())
def test_anything(values: NDArray[np.float32], piece: int, small: bool) -> None:
    tensor = torch.from_numpy(values.copy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_PIECE", piece)
        patch.setattr(host, "SMALL", 60 if small else 0)
        assert_moments(statistics.moments(tensor).numpy(), tensor)
        square, count = statistics.squares(tensor).numpy()
    expected = exactly(known(tensor) ** 2)
    assert square == pytest.approx(expected, rel=SINGLE, abs=0)
    assert count == known(tensor).size


# A hundred million entries. Sums in single precision stop growing long before; here each is that
# of a few entries times how often they occur.
PATTERN, TIMES = 99_991, 1001


@pytest.fixture(scope="module")
def pattern() -> Tensor:
    found = normal(PATTERN, mean=0.5)
    found[::10] = 0.0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_1e8_entries(dtype: torch.dtype, pattern: Tensor) -> None:
    pattern = pattern.to(dtype)
    tensor, some = pattern.repeat(TIMES), entries(pattern)
    assert tensor.numel() > 1e8
    sums = [TIMES * some.size, TIMES * some.sum(), TIMES * (some**2).sum()]
    row = statistics.moments(tensor).numpy()
    np.testing.assert_allclose(row[:2], sums[:2], rtol=SINGLE)
    np.testing.assert_allclose(row[2], sums[2], rtol=SINGLE)
    assert row[3:].tolist() == [some.min(), some.max(), TIMES * (some == 0).sum(), 0]
    square, count = statistics.squares(tensor).numpy()
    assert (square, count) == (pytest.approx(sums[2], rel=SINGLE), sums[0])


def test_1e8_entries_on_a_device(pattern: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    as_devices_do(monkeypatch, pattern)
    # Its size there: of a piece, what is beside it does not stay in this machine's cache.
    monkeypatch.setattr(statistics, "_LARGE_CHUNK", 65_536)
    some = entries(pattern)
    row = statistics.moments(pattern.repeat(TIMES)).numpy()
    sums = [TIMES * some.size, TIMES * some.sum(), TIMES * (some**2).sum()]
    np.testing.assert_allclose(row[:3], sums, rtol=DOUBLE)
    assert row[3:].tolist() == [some.min(), some.max(), TIMES * (some == 0).sum(), 0]


# Pairs.


def update(before: Tensor, after: Tensor, gradient: Tensor) -> list[float]:
    change, wide = entries(after) - entries(before), entries(gradient)
    kept = np.isfinite(change) & np.isfinite(wide)
    change, wide = change[kept], wide[kept]
    given_one = wide != 0
    sums = [exactly(change**2), exactly(wide * change), exactly(wide**2)]
    return [*sums, kept.sum(), given_one.sum(), (given_one & (change == 0)).sum()]


def assert_update(found: Tensor, expected: list[float], parts: float = 0.0) -> None:
    # Entries of float32 in float64: nothing is rounded but the sums.
    np.testing.assert_allclose(found[[0, 2]], np.array(expected)[[0, 2]], rtol=DOUBLE, atol=0)
    assert float(found[1]) == pytest.approx(expected[1], rel=DOUBLE, abs=DOUBLE * parts)
    assert found[3:].tolist() == expected[3:]


@pytest.mark.parametrize("way", [as_it_is, as_devices_do])
@pytest.mark.parametrize(
    "name", [name for name, x in TENSORS.items() if x.is_floating_point() and x.numel() < 1e6]
)
def test_update_products(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch, TENSORS[name])
    gradient = statistics.plain(TENSORS[name])
    before = normal(gradient.numel()).to(gradient.dtype)
    after = before - 0.01 * normal(gradient.numel() + 1)[1:].to(gradient.dtype)
    after[::4] = before[::4]
    if before.numel() > 3:
        after[1], before[2] = torch.nan, torch.inf
    expected = update(before, after, gradient)
    parts = math.sqrt(expected[0]) * math.sqrt(expected[2])
    assert_update(statistics.update_products(before, after, gradient), expected, parts)
    # The change as extreme as the gradient.
    weight = torch.zeros_like(gradient)
    expected = update(weight, gradient, before)
    parts = math.sqrt(expected[0]) * math.sqrt(expected[2])
    assert_update(statistics.update_products(weight, gradient, before), expected, parts)


@pytest.mark.parametrize("way", [as_it_is, as_devices_do])
def test_update_of_mixed_formats(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    before, gradient = normal(20_000), normal(20_000).bfloat16()
    way(monkeypatch, before)
    after = before - 1e-3 * gradient
    expected = update(before, after, gradient)
    assert_update(statistics.update_products(before, after, gradient), expected)


# Counts.

SHAPED = {
    name: tensor.reshape(1, -1) if tensor.dim() < 2 else tensor for name, tensor in TENSORS.items()
}


@pytest.mark.parametrize("way", [as_it_is, as_devices_do])
@pytest.mark.parametrize("name", SHAPED)
def test_active_units(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = SHAPED[name]
    way(monkeypatch, tensor)
    wide = tensor.resolve_conj().to(torch.complex128 if tensor.is_complex() else torch.float64)
    for dim in (1, -1):
        others = tuple(index for index in range(tensor.dim()) if index != dim % tensor.dim())
        found = statistics.active_units(tensor, dim)
        assert found.dtype == torch.bool
        np.testing.assert_array_equal(found.numpy(), (wide.numpy() != 0).any(axis=others))


@pytest.mark.parametrize("way", [as_it_is, as_devices_do])
@pytest.mark.parametrize("limits", [(0.0, 1.0), (-0.5, 0.25), (-math.inf, 1e300)], ids=str)
@pytest.mark.parametrize("name", [name for name, x in TENSORS.items() if x.is_floating_point()])
def test_entries_outside_a_range(
    name: str, limits: tuple[float, float], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = TENSORS[name]
    way(monkeypatch, tensor)
    low, high = limits
    every = entries(tensor)
    found = statistics.count_outside(tensor, low, high)
    # Infinite entries are beyond the largest number of their format.
    assert found.dtype == torch.float64
    assert float(found) == ((every <= low) | (every >= high)).sum()


@pytest.mark.parametrize("name", SHAPED)
def test_touched_rows(name: str) -> None:
    tensor = SHAPED[name]
    wide = np.array(entries(tensor)).reshape(len(tensor), -1)
    assert float(statistics.touched_rows(tensor)) == (wide != 0).any(axis=1).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0, 1, 5000, 100_000])
def test_underflows(dtype: torch.dtype, size: int) -> None:
    tiny = torch.finfo(dtype).tiny
    tensor = (normal(size).double() * tiny).to(dtype)
    tensor[3::7], tensor[5::11] = 0.0, torch.nan
    lost, finite = statistics.underflows(tensor).numpy()
    every = np.abs(entries(tensor))
    assert finite <= size
    assert size == 0 or finite >= min(size, 8000) * 0.7
    if size <= 8192:
        assert lost == ((every > 0) & (every < tiny)).sum()
        assert finite == np.isfinite(every).sum()
    else:
        share = ((every > 0) & (every < tiny)).sum() / np.isfinite(every).sum()
        assert lost / finite == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", [n for n, x in TENSORS.items() if x.dtype.is_floating_point])
def test_octaves(name: str) -> None:
    tensor = statistics.plain(TENSORS[name])
    sizes = np.abs(known(tensor))
    counts = statistics.magnitudes([tensor])[0].numpy()
    for edge in (-112, -30, -3, 0, 2, 14):
        # No logarithm, which rounds: what is in the bins up to there is smaller.
        below = (sizes > 0) & (sizes < 2.0 ** (edge + 1))
        assert counts[: edge + 113].sum() == below.sum()
    assert counts[:128].sum() == (sizes > 0).sum()
    assert counts[-1] == sizes.size
    assert counts[-2] == ((sizes > 0) & (sizes < torch.finfo(tensor.dtype).tiny)).sum()
