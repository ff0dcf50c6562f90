"""Adding up the rows of a step in which more and more forwards run, where they are."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradscope.capture import derive, single_precision
from gradscope.capture.statistics import MOMENTS

# What, of which entity, the numbers on the device, further numbers that the host knows.
Row = tuple[derive.What, int, Tensor, tuple[float, ...]]

_Numbers = Literal["moments", "sums", "largest"]
# What each forward adds to, and what its numbers are.
_NUMBERS: Mapping[derive.What, _Numbers] = {
    "output": "moments",
    "output_gradient": "moments",
    "signal": "moments",
    "saturated": "sums",
    "underflow": "sums",
    "training": "sums",
    "signal_spread": "sums",
    "similarity": "sums",
    "output_magnitudes": "sums",
    "output_gradient_magnitudes": "sums",
    "attention_entropy": "sums",
    "attention_logit": "largest",
    "attention_bound": "largest",
}

_MIN, _MAX = MOMENTS.index("min"), MOMENTS.index("max")


def condensed(rows: Sequence[Row]) -> list[Row]:
    """One row for all that several forwards added of an entity; the others as they are.

    What `derive` would make of the rows stays the same, but for the order of the additions.
    """
    groups: dict[tuple[derive.What, int, torch.device], list[Row]] = {}
    kept = []
    for row in rows:
        what, entity, numbers, _ = row
        if what in _NUMBERS:
            groups.setdefault((what, entity, numbers.device), []).append(row)
        else:
            kept.append(row)
    # Those of the same shape at once: each operation costs more than its numbers.
    alike: dict[tuple[derive.What, torch.device, int], list[list[Row]]] = {}
    for (what, _, device), group in groups.items():
        alike.setdefault((what, device, len(group)), []).append(group)
    for (what, _, length), same in alike.items():
        if length == 1:
            kept += [group[0] for group in same]
            continue
        numbers = torch.stack([row[2] for group in same for row in group])
        added = _added(numbers.unflatten(0, (len(same), length)), _NUMBERS[what])
        for group, total in zip(same, added.unbind(), strict=True):
            known = tuple(map(sum, zip(*(row[3] for row in group), strict=True)))
            kept.append((what, group[0][1], total, known))
    return kept


def _added(numbers: Tensor, what: _Numbers) -> Tensor:
    """Of numbers (groups × rows × numbers) those of each group."""
    if what == "largest":
        return numbers.amax(dim=1)
    if what == "moments" and numbers.dtype == torch.float32:
        return single_precision.merged(numbers)
    total = numbers.sum(dim=1)
    if what == "moments":
        total[:, _MIN] = numbers[:, :, _MIN].amin(dim=1)
        total[:, _MAX] = numbers[:, :, _MAX].amax(dim=1)
    return total
