"""Sufficient statistics on devices without float64, in float32 alone; `widening` reads them.

Sums of squares are taken about the mean, and merged over pieces as Chan, Golub & LeVeque do
("Updating formulae and a pairwise algorithm for computing sample variances", 1979): what is left
of a standard deviation far below the mean is right. Entries are first divided by a power of two,
which is exact, so that squares of 1e±20 neither overflow nor vanish; its exponent is kept beside
the sums. Counts beyond 2**24 are rounded to float32.
Nothing here makes the host wait for a device.
"""

import torch
from torch import Tensor

# What a piece needs beside it stays below 50 MB.
_PIECE = 1_048_576

# Of powers of two whose inverse is a normal number; below the first, squares still don't vanish.
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -100, 126

_MANTISSA_BITS, _BIAS, _LEAST_NORMAL = 23, 127, -126

_F32 = torch.float32


def moments(flat: Tensor) -> Tensor:
    """The moments of a flat real tensor: float32 of shape (8,).

    Exponent, count, mean, Σ(x - mean)², min, max, zeros, non-finite. Mean, min and max are in units
    of 2**exponent, the squares in units of its square. Non-finite entries are counted, and left
    out of the rest.
    """
    if flat.numel() == 0:
        nothing = torch.zeros(8, dtype=_F32, device=flat.device)
        nothing[0], nothing[4], nothing[5] = _LOWEST_EXPONENT, torch.inf, -torch.inf
        return nothing
    exponent = _exponent(flat)
    return merged(torch.stack([_piece(piece.to(_F32), exponent) for piece in flat.split(_PIECE)]))


def _piece(piece: Tensor, exponent: Tensor) -> Tensor:
    finite = torch.isfinite(piece)
    kept = torch.where(finite, piece, 0.0) * _power_of_two(-exponent)
    count = finite.sum().to(_F32)
    low = torch.where(finite, kept, torch.inf).amin()
    high = torch.where(finite, kept, -torch.inf).amax()
    mean = _mean(kept.sum() / count.clamp_min(1), low, high)
    spread = torch.where(finite, kept - mean, 0.0).square().sum()
    zeros, nonfinite = (piece == 0).sum().to(_F32), (~finite).sum().to(_F32)
    return torch.stack([exponent, count, mean, spread, low, high, zeros, nonfinite])


def merged(rows: Tensor) -> Tensor:
    """The moments of all the entries that the rows, of shape (…, rows, 8), are of: (…, 8)."""
    exponent, count, mean, spread, low, high, zeros, nonfinite = rows.unbind(-1)
    common = exponent.amax(-1, keepdim=True)
    # What is smaller by more than that does not count beside the others.
    unit = _power_of_two((exponent - common).clamp_min(_LEAST_NORMAL))
    low, high = (low * unit).amin(-1), (high * unit).amax(-1)
    mean, spread, whole = mean * unit, spread * unit.square(), count.sum(-1)
    weight = count / whole.clamp_min(1).unsqueeze(-1)
    center = _mean((weight * mean).sum(-1), low, high)
    between = count * (mean - center.unsqueeze(-1)).square()
    spread = (spread + between).sum(-1)
    sums = zeros.sum(-1), nonfinite.sum(-1)
    return torch.stack([common.squeeze(-1), whole, center, spread, low, high, *sums], -1)


def _mean(computed: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Without the rounding of the sum where all entries are the same: those have no spread."""
    return torch.where(low == high, low, computed)


def with_zeros(row: Tensor, zeros: int) -> Tensor:
    """The moments of the entries and so many zeros."""
    exponent, count, mean, spread, low, high, known, nonfinite = row.unbind()
    # Neither is 0 where there are zeros to add.
    whole = (count + zeros).clamp_min(1)
    nothing = torch.zeros_like(mean)
    return torch.stack(
        [
            exponent,
            count + zeros,
            mean * (count / whole),
            spread + mean.square() * count * (zeros / whole),
            torch.minimum(low, nothing) if zeros else low,
            torch.maximum(high, nothing) if zeros else high,
            known + zeros,
            nonfinite,
        ]
    )


def divided(row: Tensor, scale: Tensor) -> Tensor:
    """The moments of the tensor divided by the positive scale, a float32 scalar."""
    exponent = _octave(scale)
    # From 1 to 2: dividing by it overflows nothing.
    rest = scale * _power_of_two(-exponent)
    zero, one = torch.zeros_like(rest), torch.ones_like(rest)
    factors = torch.stack([one, one, rest, rest.square(), rest, rest, one, one])
    shifts = torch.stack([exponent, *[zero] * 7])
    return row / factors - shifts


def squares(flat: Tensor) -> Tensor:
    """(exponent, Σx² in units of 4**exponent, count) of the finite entries: float32, (3,)."""
    if flat.numel() == 0:
        return torch.zeros(3, dtype=_F32, device=flat.device)
    exponent = _exponent(flat)
    unit = _power_of_two(-exponent)
    total = torch.zeros(2, dtype=_F32, device=flat.device)
    for piece in flat.split(_PIECE):
        kept = _finite(piece) * unit
        total += torch.stack([kept.square().sum(), torch.isfinite(piece).sum().to(_F32)])
    return torch.cat([exponent.reshape(1), total])


def update_products(before: Tensor, after: Tensor, gradient: Tensor) -> Tensor:
    """Of the given coordinates: float32 of shape (8,).

    The exponents of change and gradient; in their units Σ Δw², Σ g·Δw, Σ g²; the number of
    coordinates; of those with a gradient other than zero the number, and how many did not change.
    Coordinates where the change or the gradient is not finite are left out.
    """
    change, wide = after.to(_F32) - before.to(_F32), gradient.to(_F32)
    clean = torch.isfinite(change) & torch.isfinite(wide)
    change, wide = torch.where(clean, change, 0.0), torch.where(clean, wide, 0.0)
    exponents = _exponent(change), _exponent(wide)
    given = wide != 0
    small = change * _power_of_two(-exponents[0]), wide * _power_of_two(-exponents[1])
    return torch.stack(
        [
            *exponents,
            small[0].square().sum(),
            (small[0] * small[1]).sum(),
            small[1].square().sum(),
            clean.sum().to(_F32),
            given.sum().to(_F32),
            (given & (change == 0)).sum().to(_F32),
        ]
    )


def _finite(tensor: Tensor) -> Tensor:
    wide = tensor.to(_F32)
    return torch.where(torch.isfinite(wide), wide, 0.0)


def _exponent(flat: Tensor) -> Tensor:
    """That of a power of two near the largest finite magnitude, as a float32 scalar."""
    largest = [_finite(piece).abs().amax() for piece in flat.split(_PIECE)]
    return _octave(torch.stack(largest).amax()).clamp(_LOWEST_EXPONENT, _HIGHEST_EXPONENT)


def _octave(number: Tensor) -> Tensor:
    """⌊log2⌋ of a positive normal float32 scalar, exactly: the exponent in its bits."""
    return ((number.view(torch.int32) >> _MANTISSA_BITS) - _BIAS).to(_F32)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, exactly: from -126 to 127."""
    return ((exponent.to(torch.int32) + _BIAS) << _MANTISSA_BITS).view(_F32)
