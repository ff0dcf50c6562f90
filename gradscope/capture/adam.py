"""The second moments that Adam and its like divide by."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from gradscope.capture import statistics
from gradscope.capture.precision import widest
from gradscope.capture.shards import groups

# Of others the ε may stand elsewhere.
_KINDS = (Adam, AdamW, NAdam, RAdam)


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Those of parameters whose state lies on one device, in one format.

    limits: what √v, not yet corrected for its bias, has to exceed for √v̂ > ε: a number for each.
    """

    rows: list[int]
    flats: list[Tensor]
    limits: Tensor


def second_moments(
    optimizer: Optimizer, known: Mapping[int, tuple[int, Tensor]]
) -> Iterator[SecondMoments]:
    """Those of the known parameters: identity → table row and parameter."""
    if not isinstance(optimizer, _KINDS):
        return
    for group in optimizer.param_groups:
        name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        alike: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            entry = known.get(id(parameter))
            # A default dict: asked in another way it would get another entry.
            state = optimizer.state.get(parameter, {})
            second, step = state.get(name), state.get("step")
            if entry is None or second is None or step is None or groups(parameter):
                continue
            step = step if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")
            key = (second.device, second.dtype, step.device)
            alike.setdefault(key, []).append((entry[0], statistics.plain(second), step))
        for (device, _, counter), some in alike.items():
            # A host that asked a device for the count would wait.
            if counter.type == "cpu" or counter == device:
                rows, flats, steps = map(list, zip(*some, strict=True))
                yield SecondMoments(rows, flats, _limits(group, steps, device))


def _limits(group: Mapping[str, Any], steps: list[Tensor], device: torch.device) -> Tensor:
    dtype = widest(device)
    counts = torch.stack(steps).reshape(-1).to(dtype)
    correction: Tensor = 1.0 - group["betas"][1] ** counts
    return correction.sqrt().mul_(group["eps"]).to(device, non_blocking=True)
