"""The pulse of one step: the numbers that are known of every step."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Beyond this many values of a name they are added up.
_MANY_VALUES = 256


@dataclass(slots=True, eq=False)
class Pulse:
    """What is known of every step: name → the values it was given, on the device or not."""

    step: int
    values: dict[str, list[Tensor | float]] = field(default_factory=dict)
    # How authentic the source of the loss is that was seen so far.
    loss_rank: int = -1
    # Of how many values the first one is the sum, where it is one.
    added: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a value; several of one name within a step count as their mean."""
        values = self.values.setdefault(name, [])
        values.append(value)
        if len(values) >= _MANY_VALUES and len({_device(value) for value in values}) == 1:
            self.added[name] = self.count(name)
            self.values[name] = [sum(values[1:], start=values[0])]

    def replace(self, name: str, value: Tensor | float) -> None:
        """Set the value, whatever was there."""
        self.drop(name)
        self.values[name] = [value]

    def drop(self, name: str) -> None:
        """Forget the values of that name."""
        self.values.pop(name, None)
        self.added.pop(name, None)

    def count(self, name: str) -> int:
        """How many values of that name were added."""
        return len(self.values[name]) - 1 + self.added.get(name, 1)

    def at_hand(self, name: str) -> float | None:
        """The value of that name, if it is known without waiting for a device; NaN: none is."""
        values = self.values.get(name)
        if not values:
            return math.nan
        if any(isinstance(value, Tensor) and not value.is_cpu for value in values):
            return None
        known = (float(v.numpy()) if isinstance(v, Tensor) else v for v in values)
        return sum(known) / self.count(name)

    def copy(self) -> "Pulse":
        """As it stands now."""
        values = {name: list(values) for name, values in self.values.items()}
        return Pulse(self.step, values, self.loss_rank, dict(self.added))


def _device(value: Tensor | float) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None
