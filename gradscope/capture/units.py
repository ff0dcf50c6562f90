"""Units of module outputs: which are saturated, and which have been dead for long."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.capture import statistics
from gradscope.capture.activations import range_of_module
from gradscope.capture.config import CaptureConfig
from gradscope.capture.entities import channels_first
from gradscope.capture.precision import has_float64, widened
from gradscope.capture.recorder import Rows


@dataclass(slots=True)
class _Activity:
    """For each unit, the samples since it was last other than zero."""

    quiet: Tensor
    samples: int = 0

    def see(self, active: Tensor, samples: int) -> None:
        self.samples += samples
        if self.quiet.is_cpu:
            # Of so few numbers an operation of torch's costs ten times as much.
            quiet = self.quiet.numpy()
            quiet += samples
            quiet[active.numpy()] = 0
        else:
            self.quiet.add_(samples).masked_fill_(active, 0)

    def dead(self, after: int) -> Tensor:
        """How many have been quiet for so many samples: a scalar."""
        if self.quiet.is_cpu and has_float64(self.quiet.device):
            dead = np.count_nonzero(self.quiet.numpy() >= after)
            return torch.from_numpy(np.array(dead, np.float64))
        return widened((self.quiet >= after).sum())


class Units:
    """What is known of the units of every module use, by its table row."""

    def __init__(self, config: CaptureConfig) -> None:
        self._config = config
        self._activity: dict[int, _Activity] = {}
        # Of outputs by shape, in this forward: whether their units are dimension 1.
        self._channels_first: dict[tuple[int, ...], bool] = {}

    def forward_begins(self) -> None:
        """Which outputs have their units first is learned anew."""
        self._channels_first = {}

    def measure(self, rows: Rows, row: int, module: nn.Module, output: Tensor) -> None:
        """Add what the output says of its units: saturated entries; which are active is kept."""
        _measure_range(rows, row, output, range_of_module(module))
        self._see(row, output, units_first=self._units_first(module, output))

    def measure_call(
        self,
        rows: Rows,
        row: int,
        output: Tensor,
        limits: tuple[float, float] | None,
        *,
        has_units: bool,
    ) -> None:
        """The same of a function, whose output has its units where its input has them."""
        _measure_range(rows, row, output, limits)
        if has_units:
            units_first = self._channels_first.get(tuple(output.shape), False)
            self._see(row, output, units_first=units_first)

    def _see(self, row: int, output: Tensor, *, units_first: bool) -> None:
        if output.dim() < 2 or output.numel() == 0:  # noqa: PLR2004  (no batch dimension)
            return
        active = statistics.active_units(output, 1 if units_first else -1)
        activity = self._activity.get(row)
        if activity is None or activity.quiet.shape != active.shape:
            quiet = torch.zeros(active.shape, dtype=torch.int32, device=active.device)
            activity = self._activity[row] = _Activity(quiet)
        activity.see(active, output.shape[0])

    def _units_first(self, module: nn.Module, output: Tensor) -> bool:
        """Whether the units are dimension 1: behind convolutions, and what keeps their shape."""
        shape = tuple(output.shape)
        known = channels_first(module)
        if known is None:
            return self._channels_first.get(shape, False)
        self._channels_first[shape] = known
        return known

    def count_dead(self, rows: Rows, ran: set[int]) -> None:
        """Add how many units are dead, of the table rows that ran."""
        for row in sorted(ran & self._activity.keys()):
            activity = self._activity[row]
            if activity.samples >= self._config.dead_after_samples:
                dead = activity.dead(self._config.dead_after_samples)
                rows.add("dead", row, dead, float(activity.quiet.numel()))


def _measure_range(
    rows: Rows, row: int, output: Tensor, limits: tuple[float, float] | None
) -> None:
    # What has no order has no end of its range.
    if limits is not None and not output.is_complex():
        outside = statistics.count_outside(output, *limits)
        rows.add("saturated", row, outside, float(output.numel()))
