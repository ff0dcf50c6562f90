"""Statistics of parameters that are split over processes: theirs together, from those of each.

All processes of a group meet here, within calls that training makes on each of them: never where
one of them alone may come along, as in `report()` or `close()`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.cadence import Cadence
from gradscope.capture.derive import What
from gradscope.capture.distributed import Presence
from gradscope.capture.guard import HISTOGRAMS, STEPS, Guard, in_words
from gradscope.capture.recorder import Rows, to_host
from gradscope.capture.shards import Groups, groups, merge_device, mesh_ranks
from gradscope.capture.statistics import MOMENTS, OCTAVES

_F64 = torch.float64

# What each process contributes of a parameter, and how many numbers that is as it is collected.
_WIDTHS: dict[What, int] = {
    "gradient": len(MOMENTS),
    "weight": 2,
    "update": 7,
    "magnitudes": OCTAVES + 2,
}
# Of the moments min and max are not sums.
_ADDED = (0, 1, 2, 5, 6)
_MIN, _MAX = 3, 4

P = ParamSpec("P")
_Key = tuple[What, int]


@dataclass(frozen=True, slots=True)
class Family:
    """Parameters that are split over the same processes.

    groups: one per mesh dimension; all of them together are reached one after the other.
    counts: row → whether this process's part of it counts, and is not a replica of another's.
    """

    groups: Groups
    counts: Mapping[int, bool]
    ranks: tuple[int, ...]
    device: torch.device


def families(parameters: Iterable[tuple[int, Tensor]]) -> list[Family]:
    """The split ones among the parameters, in the same order on every process."""
    split = {row: (groups(tensor), tensor) for row, tensor in parameters}
    split = {row: (among, tensor) for row, (among, tensor) in split.items() if among}
    kinds = {frozenset(among): among for among, _ in split.values()}
    # Split over some of a mesh's dimensions only, a parameter goes with those split over all.
    widest = [kind for kind in kinds if not any(kind < other for other in kinds)]
    found = []
    for kind in widest:
        counts, device, ranks = {}, None, set()
        for row, (among, tensor) in split.items():
            home = next(other for other in widest if frozenset(among) <= other)
            if home == kind:
                replicas = kind - frozenset(among)
                counts[row] = all(dist.get_rank(group) == 0 for group in replicas)
                device = device or merge_device(tensor)
                ranks |= set(mesh_ranks(tensor))
        if device is not None:
            found.append(Family(_fewest(kinds[kind]), counts, tuple(sorted(ranks)), device))
    return found


def _fewest(among: Groups) -> Groups:
    """One group instead of one per dimension where all processes belong to it."""
    world = dist.group.WORLD
    everyone = world is not None and math.prod(group.size() for group in among) == world.size()
    if world is not None and len(among) > 1 and everyone:
        return (world,)
    return among


@dataclass(slots=True)
class _Decision:
    """What the processes have agreed on, on its way to the host."""

    step: int
    numbers: Tensor
    arrived: torch.cuda.Event | None


class ShardMerge:
    """Merges the rows of split parameters, once per recorded step, and settles the next such step.

    In the step hook after which all parameters have been updated that were in the last recorded
    step (in the first: all trainable ones); what is left then, when the next forward begins. One
    reduction by sum and one by maximum, per group of processes that parameters are split over.

    A process that fails, or whose watch is closed, takes part until the next merge, without
    numbers, and says so there: then it ends on all of them.
    """

    def __init__(
        self,
        cadence: Cadence,
        watched: Callable[[], Iterable[Tensor]],
        presence: Presence | None,
        guard: Guard,
    ) -> None:
        self._cadence = cadence
        # None once it is known that the others are there.
        self._presence = presence
        self._watched = watched
        self._guard = guard
        # Of the recorded step: split parameters, those whose update is awaited, and those updated.
        self._families: list[Family] = []
        self._rows: dict[int, int] = {}
        self._awaited: set[int] = set()
        self._updated: set[int] = set()
        self._merged: set[_Key] = set()
        self._step = self._proposed = 0
        self._decision: _Decision | None = None
        # Whether any watched parameter is split, and whether rows of the open step wait.
        self.active = False
        self.pending = False
        # Whether this process has nothing more to contribute, and whether merging has ended.
        self.leaving = False
        self.over = False

    def due(self, step: int) -> bool:
        """Whether the step that opens is recorded."""
        if self._decision is not None:
            # The largest proposal counts: before this process's own there is no need to look.
            if step < self._proposed:
                return False
            self._settle(self._decision)
        if self.over:
            return False
        # Where parameters are split no process takes a look of its own.
        if not self._cadence.due(step) and (self.active or not self._cadence.take_wanted()):
            return False
        self.look()
        self._step = step
        self.pending = False
        return True

    def recorded(self) -> None:
        """The recorded step has closed: where no other process has a say, the next is settled."""
        if not self.active:
            self._cadence.agree(self._cadence.propose(self._step))

    def _settle(self, decision: _Decision) -> None:
        self._decision = None
        if decision.arrived is not None:
            decision.arrived.synchronize()
        stopped, uncounted, distance = decision.numbers.tolist()
        self._cadence.agree(decision.step + int(distance))
        if uncounted:
            self._guard.disable(HISTOGRAMS, "they failed on another process")
        if stopped:
            self._end(
                "on another process the watch failed or was closed; gradients of parameters that "
                "are split are only known together"
            )

    def _end(self, reason: str) -> None:
        self.over = True
        if self.leaving:
            self._guard.end(STEPS)
        else:
            self._guard.disable(STEPS, reason)

    def look(self) -> None:
        """Find out whether any watched parameter is split."""
        together = dist.is_available() and dist.is_initialized()
        self.active = together and any(groups(tensor) for tensor in self._watched())

    def attempt(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run what may fail: where other processes wait for this one, it then goes on without."""
        if not self.active:
            action(*args, **kwargs)
        elif not self.leaving:
            try:
                action(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  (whatever it is, the others wait)
                self.leave(in_words(error))

    def leave(self, reason: str | None = None) -> None:
        """Have no more numbers, because of a failure or of its own accord."""
        if reason is not None and not self.leaving:
            self._guard.say(STEPS, f"{STEPS} disabled: {reason}")
        self.leaving = True

    def begin(self, parameters: Iterable[tuple[int, Tensor]]) -> None:
        """The step's parameters are about to be read: the row of each."""
        if not self.active:
            return
        known = list(parameters)
        self._families = families(known)
        split = {row for family in self._families for row in family.counts}
        self._rows = {id(tensor): row for row, tensor in known if row in split}
        trainable = {row for row, tensor in known if row in split and tensor.requires_grad}
        self._awaited = (self._updated & split) or trainable
        self._updated, self._merged = set(), set()
        self.pending = bool(split)

    def updated(self, rows: Rows, parameters: Iterable[Tensor]) -> None:
        """A step of the optimizer of these has ended: merge if it is the last one's."""
        ended = {self._rows[id(p)] for p in parameters if id(p) in self._rows}
        if not ended:
            return
        self._updated |= ended
        self.pending = True
        if self._awaited:
            self._awaited -= ended
            if not self._awaited:
                self.merge(rows)

    def merge(self, rows: Rows) -> None:
        """Merge what has not been merged; all processes come here at the same point."""
        if not self.pending:
            return
        self.pending = False
        if self._presence is not None:
            if not self._presence.is_complete(r for f in self._families for r in f.ranks):
                self._end(
                    "parameters are split, and not every process calls watch(); call it on all"
                )
                return
            self._presence = None
        try:
            self._proposed = self._cadence.propose(self._step)
        except Exception as error:  # noqa: BLE001  (the others wait: nothing may end this here)
            self._proposed = self._step + 1
            self.leave(in_words(error))
        uncounted = float(self._guard.is_disabled(HISTOGRAMS))
        distance = float(self._proposed - self._step)
        control = torch.tensor([0.0, uncounted, distance], dtype=_F64, device="cpu")
        for family in self._families:
            control = self._merge_family(rows, family, control)
        self._decision = _Decision(self._step, *to_host(control.device, control))

    def _merge_family(self, rows: Rows, family: Family, control: Tensor) -> Tensor:
        collected: dict[_Key, tuple[Tensor, tuple[float, ...]]] = {}
        added, extremes = _nothing(family)
        try:
            if not self.leaving:
                collected = self._collected(rows, family)
                added, extremes = _contribution(collected, family)
        except Exception as error:  # noqa: BLE001  (as above)
            self.leave(in_words(error))
        if self.leaving:
            control[0] = 1.0
        control = control.to(family.device, non_blocking=True)
        numbers, largest = added.reshape(-1), torch.cat([extremes.reshape(-1), control])
        for group in family.groups:
            dist.all_reduce(numbers, dist.ReduceOp.SUM, group=group)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        control = largest[-len(control) :]
        merged = _merged(
            numbers.view_as(added), largest[: -len(control)].view_as(extremes), control[:2] > 0
        )
        at = {row: index for index, row in enumerate(family.counts)}
        kept = [entry for entry in rows.entries if (entry[0], entry[1]) not in collected]
        rows.entries = kept + [(what, row, merged[what][at[row]], ()) for what, row in collected]
        self._merged |= collected.keys()
        return control

    def _collected(
        self, rows: Rows, family: Family
    ) -> dict[_Key, tuple[Tensor, tuple[float, ...]]]:
        return {
            (what, row): (numbers, known)
            for what, row, numbers, known in rows.entries
            if what in _WIDTHS and row in family.counts and (what, row) not in self._merged
        }


def _nothing(family: Family) -> tuple[Tensor, Tensor]:
    """The contribution of a process that has none: sums, and (max, −min), per parameter."""
    size = len(family.counts)
    added = torch.zeros(size, sum(_WIDTHS.values()) - 2, dtype=_F64, device=family.device)
    return added, torch.full((size, 2), -torch.inf, dtype=_F64, device=family.device)


def _contribution(
    collected: Mapping[_Key, tuple[Tensor, tuple[float, ...]]], family: Family
) -> tuple[Tensor, Tensor]:
    """The statistics of this process's parts: sums, and (max, −min), per parameter."""

    def stacked(what: What, absent: Tensor) -> Tensor:
        parts = [
            collected[what, row][0] if counts and (what, row) in collected else absent
            for row, counts in family.counts.items()
        ]
        return torch.stack([part.to(family.device, non_blocking=True) for part in parts])

    def zeros(width: int) -> Tensor:
        return torch.zeros(width, dtype=_F64, device=family.device)

    moments = stacked("gradient", statistics.moments(zeros(0)))
    # What a sample stands for: a process's own sample, its own part of the parameter.
    scales = [collected.get(("update", row), (None, (1.0,)))[1][0] for row in family.counts]
    scale = torch.tensor(scales, dtype=_F64, device="cpu").to(family.device, non_blocking=True)
    products = stacked("update", zeros(6))
    added = torch.cat(
        [
            moments[:, _ADDED],
            stacked("weight", zeros(2)),
            products[:, :3] * scale[:, None],
            products[:, 3:4],
            products[:, 3:] * scale[:, None],
            stacked("magnitudes", zeros(OCTAVES + 2)),
        ],
        1,
    )
    return added, torch.stack([moments[:, _MAX], -moments[:, _MIN]], 1)


def _merged(added: Tensor, extremes: Tensor, missing: Tensor) -> dict[What, Tensor]:
    """The statistics of whole parameters, a row for each.

    missing: whether a process had none, and whether one had no histograms: unknown, then.
    """
    added = torch.where(missing[0], torch.nan, added)
    sums, weight, update, magnitudes = added.split([5, 2, 7, OCTAVES + 2], 1)
    count, total, sumsq, zeros, nonfinite = sums.unbind(1)
    highest, lowest = extremes[:, 0], -extremes[:, 1]
    scale = update[:, 4:5] / update[:, 3:4]
    return {
        "gradient": torch.stack([count, total, sumsq, lowest, highest, zeros, nonfinite], 1),
        "weight": weight,
        "update": torch.cat(
            [update[:, :3] / scale, update[:, 3:4], update[:, 5:] / scale, scale], 1
        ),
        # Counts are whole numbers: none where they are not known.
        "magnitudes": torch.where(missing.any(), 0.0, magnitudes),
    }
