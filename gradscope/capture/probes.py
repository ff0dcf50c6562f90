"""Probes of the parameters: a gradient and the one before, rows that are alike, Adam's epsilon."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from gradscope.capture import pairs
from gradscope.capture.adam import second_moments
from gradscope.capture.recorder import Rows
from gradscope.capture.samples import Draw, entries, is_turn
from gradscope.capture.scaling import beside
from gradscope.capture.shards import groups, local

# Coordinates of a parameter: the error of a cosine is about 1/√256, that of a share at most 3 %.
_COORDINATES = 256
# What is kept of the last two gradients takes no more than a hundredth of what the parameters do,
# and so many entries: 1 MB in float32.
_SHARE, _KEPT = 0.01, 262_144
_ROWS, _COLUMNS = 64, 64


@dataclass(frozen=True, slots=True)
class Sampled:
    """A parameter's gradient on a sample, as the optimizer is given it.

    skipped: whether the optimizer leaves the parameter as it is, if that is not known yet.
    """

    row: int
    parameter: Tensor
    gradient: Tensor
    skipped: Tensor | None


# Table row, the parameter's size, that of its sample: alike, they have the same coordinates.
_Key = tuple[int, int, int]


class ParameterProbes:
    """What is kept of the parameters from one recorded step to the next."""

    def __init__(self) -> None:
        self._draw = Draw(_COORDINATES)
        self._columns = Draw(_COLUMNS)
        self._matrix_rows = Draw(_ROWS, distinct=True)
        self._recorded = 0
        self._step = -1
        # Samples of gradients that were read together, of the step before and of this one.
        self._earlier: dict[tuple[_Key, ...], Tensor] = {}
        self._current: dict[tuple[_Key, ...], Tensor] = {}

    def begin(self, step: int, parameters: Iterable[Tensor]) -> None:
        """A step is recorded."""
        self._recorded += 1
        self._earlier = self._current if step == self._step + 1 else {}
        self._step, self._current = step, {}
        size = _size([entries(parameter) for parameter in parameters])
        if size != self._draw.size:
            self._draw, self._earlier = Draw(size), {}

    def weights(self, rows: Rows, matrices: Iterable[tuple[int, Tensor]]) -> None:
        """Which rows of the matrices are alike, before any update."""
        if not is_turn(self._recorded):
            return
        for row, parameter in matrices:
            matrix = local(parameter.detach())
            columns = min(matrix.shape[1:].numel(), _COLUMNS)
            if not groups(parameter) and pairs.is_comparable(matrix.dtype, columns):
                sample = sampled(matrix, self._matrix_rows, self._columns)
                rows.add("duplicates", row, pairs.duplicate_rows(sample))

    def gradients(self, rows: Rows, read: Sequence[Sampled]) -> None:
        """How they lie to those of the step before."""
        alike: dict[tuple[torch.device, torch.dtype], list[Sampled]] = {}
        for entry in read:
            # Of a parameter that is split a process knows its own part.
            if not groups(entry.parameter):
                key = (entry.gradient.device, entry.gradient.dtype)
                alike.setdefault(key, []).append(entry)
        for some in alike.values():
            now = _matrix([self._draw.of(entry.gradient) for entry in some])
            if (skipped := some[0].skipped) is not None:
                now = now.masked_fill(beside(skipped, now), torch.nan)
            keys = tuple((e.row, entries(e.parameter), e.gradient.numel()) for e in some)
            self._current[keys] = now
            self._compare(rows, keys, now)

    def _compare(self, rows: Rows, keys: tuple[_Key, ...], now: Tensor) -> None:
        before = self._earlier.get(keys)
        if before is None:
            # Not each step has the same parameters a gradient.
            known = {
                key: sample
                for others, matrix in self._earlier.items()
                for key, sample in zip(others, matrix, strict=True)
                if matrix.device == now.device
            }
            both = [place for place, key in enumerate(keys) if key in known]
            if not both:
                return
            keys = tuple(keys[place] for place in both)
            now = _matrix([now[place, : keys[index][2]] for index, place in enumerate(both)])
            before = _matrix([known[key][: key[2]] for key in keys])
        products = pairs.cosine_products(now, before)
        for (row, _, _), numbers in zip(keys, products.unbind(), strict=True):
            rows.add("previous", row, numbers)

    def states(
        self, rows: Rows, optimizer: Optimizer, known: Mapping[int, tuple[int, Tensor]]
    ) -> None:
        """What the optimizer holds of the parameters after its step."""
        if not is_turn(self._recorded):
            return
        for moments in second_moments(optimizer, known):
            sample = _matrix([self._draw.of(flat) for flat in moments.flats])
            found = pairs.below(sample, moments.limits)
            for row, numbers in zip(moments.rows, found.unbind(), strict=True):
                rows.add("epsilon", row, numbers)


def sampled(tensor: Tensor, rows: Draw, columns: Draw) -> Tensor:
    """Of a sample of its rows the entries in the same places: of shape (rows, columns)."""
    flat = tensor.flatten(1)
    at, places = rows(len(flat), flat.device), columns(flat.shape[1], flat.device)
    if at is None or places is None:
        flat = flat if at is None else flat.index_select(0, at)
        return flat if places is None else flat.index_select(1, places)
    return flat[at[:, None], places]


def _matrix(rows: Sequence[Tensor]) -> Tensor:
    """With zeros behind the shorter ones, which add nothing to a sum."""
    most = max(map(len, rows))
    alike = [row if len(row) == most else pad(row, (0, most - len(row))) for row in rows]
    return torch.stack(alike)


def _size(sizes: Sequence[int]) -> int:
    size = _COORDINATES
    allowed = _SHARE * sum(sizes) + _KEPT
    # A step's samples lie in one matrix, and there are two of them.
    while size > 1 and 2 * size * len(sizes) > allowed:
        size //= 2
    return size
