"""How wide a device's numbers are: some have no float64 (Apple's, some mobile ones)."""

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: asked of it once, without waiting for an answer."""
    try:
        # Some make such a tensor, and have no kernel for it.
        torch.ones((), dtype=torch.float64, device=device).neg_()
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """The widest format that the device has: float64, else float32."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """A copy in the widest format that its device has."""
    return tensor.to(widest(tensor.device), copy=True)
