"""Arrays for the page's pictures: fewer columns without losing an event, and few bytes."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.robust import Bools, measured, median
from gradscope.record import FloatArray, StepArray

# Above every distance from a median.
_NONFINITE, _ZERO = 1e9, 1e8
# Where single precision has its exponent; all ones: not a finite number.
_EXPONENT = np.uint32(0x7F80_0000)


@dataclass(frozen=True, eq=False, slots=True)
class Columns:
    """`values` (rows × columns, NaN: not measured, +inf: NaN or infinite) and the steps of each."""

    values: FloatArray
    first: StepArray
    last: StepArray


def columns(
    values: FloatArray, broken: Bools, steps: StepArray, most: int, *, log: bool
) -> Columns:
    """Steps × rows as at most so many columns.

    Where several steps share a column, it holds the value that stands out: what is not finite,
    else a zero (where the scale is logarithmic), else the one farthest from its row's median.
    """
    marked = np.where(broken | np.isinf(values), np.inf, values).astype(np.float32)
    size = -(-len(steps) // max(1, most))
    if size <= 1:
        return Columns(np.ascontiguousarray(marked.T), steps, steps)
    blocks = -(-len(steps) // size)
    padded = np.full((blocks * size, values.shape[1]), np.nan, np.float32)
    padded[: len(steps)] = marked
    weights = _weights(padded, log=log).reshape(blocks, size, -1)
    chosen = weights.argmax(axis=1)[:, None, :]
    pooled = np.take_along_axis(padded.reshape(blocks, size, -1), chosen, axis=1)[:, 0]
    ends = np.minimum(np.arange(1, blocks + 1) * size, len(steps)) - 1
    return Columns(np.ascontiguousarray(pooled.T), steps[::size], steps[ends])


def _weights(values: FloatArray, *, log: bool) -> NDArray[np.float64]:
    plain = np.isfinite(values) & ((values > 0) | (not log))
    scale = np.full(values.shape, np.nan)
    np.copyto(scale, values, where=plain)
    if log:
        np.log10(scale, out=scale, where=plain)
    distance = np.abs(scale - median(scale, axis=0))
    weights: NDArray[np.float64] = np.select(
        [values == np.inf, (values == 0) & log, plain], [_NONFINITE, _ZERO, distance], -1.0
    )
    return weights


def quantiles(values: FloatArray, shares: Sequence[float]) -> list[NDArray[np.float64]]:
    """The quantiles of each row over what was measured; NaN where nothing was.

    Interpolated as in numpy.nanquantile, which takes the rows one by one.
    """
    ordered = np.sort(values.astype(np.float64), axis=1)  # NaN comes last
    last = np.maximum(measured(values).sum(axis=1, keepdims=True) - 1, 0)
    made = []
    for share in shares:
        place = share * last
        below = np.take_along_axis(ordered, np.floor(place).astype(int), axis=1)
        above = np.take_along_axis(ordered, np.ceil(place).astype(int), axis=1)
        made.append((below + (place - np.floor(place)) * (above - below))[:, 0])
    return made


def packed(values: FloatArray) -> str:
    """The numbers in base64, compressed, with 11 significant bits each as half precision has.

    Half precision itself ends at 6e-8, where vanishing gradients begin: the exponent is that of
    single precision. Three planes of bytes, as like ones side by side compress well: exponent; 8
    bits of the fraction; 2 more bits and the sign.
    """
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    fraction = 1 << 12  # half of the last bit that is kept
    finite = np.isfinite(values).reshape(-1)
    rounded = np.where(finite, bits + np.uint32(fraction), bits)
    # Rounding up the largest would make it infinite.
    overflown = finite & ((rounded & _EXPONENT) == _EXPONENT)
    rounded = np.where(overflown, bits, rounded)
    # A NaN whose payload is cut off would be infinite.
    rounded = np.where(np.isnan(values).reshape(-1), np.uint32(0x7FC0_0000), rounded)
    planes = np.concatenate(
        [
            (rounded >> 23) & 0xFF,
            (rounded >> 15) & 0xFF,
            ((rounded >> 12) & 0b110) | (rounded >> 31),
        ]
    )
    return compressed(planes.astype(np.uint8))


def compressed(values: NDArray[np.uint8]) -> str:
    """Bytes in base64, compressed."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")
