"""Gradients, weights and updates of the parameters, as an optimizer's step is given them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.capture import statistics
from gradscope.capture.entities import Roster
from gradscope.capture.guard import HISTOGRAMS, Guard
from gradscope.capture.recorder import Rows
from gradscope.capture.scaling import Deferred, beside, divided, unless, unscaled
from gradscope.capture.shards import groups, is_laid_out_alike, local

# Updates of larger tensors are measured on a sample: a copy of all would double the memory.
# Histograms are counted on that copy.
_EXACT_UPTO = 65_536
# The relative error of a norm from m coordinates is about 1/√(2m): 0.8 % for evenly sized ones.
_SAMPLE = 8_192


def sampling(parameters: Iterable[Tensor]) -> str | None:
    """What is measured on a sample, in words; None where nothing is."""
    if all(_entries(parameter) <= _EXACT_UPTO for parameter in parameters):
        return None
    return (
        f"updates and histograms of parameters above {_EXACT_UPTO:,} entries, "
        f"on a fixed sample of {_SAMPLE:,}"
    )


def _entries(parameter: Tensor) -> int:
    """The real numbers that it holds; of a parameter that is split, that this process holds."""
    return statistics.real_entries(local(parameter))


@dataclass(slots=True)
class _Pending:
    """A parameter between reading and update."""

    row: int
    parameter: Tensor
    coordinates: Tensor | None
    before: Tensor
    gradient: Tensor
    # Whether that is in the dtype that the gradient has.
    in_own_dtype: bool
    # Whether the update is not made after all.
    skipped: Tensor | None


class ParameterReader:
    """Reads the parameters of one recorded step: each once, at its optimizer's step.

    Anew if another step begins with them before the first has ended: that one failed and is tried
    again, or is an optimizer's that has another do the update, as sharpness-aware ones do.
    """

    def __init__(
        self,
        roster: Roster,
        rows: Rows,
        samples: "CoordinateSamples",
        guard: Guard,
        *,
        split_only: bool = False,
    ) -> None:
        self._guard = guard
        self._rows = rows
        self._samples = samples
        self._roster = roster
        self._known = roster.parameters
        if split_only:
            self._known = {key: entry for key, entry in self._known.items() if groups(entry[1])}
        self._embeddings = roster.embeddings
        self._read: set[int] = set()
        self._missing: set[int] = set()
        self._updated: set[int] = set()
        self._pending: list[_Pending] = []

    def parameters(self) -> Iterable[tuple[int, Tensor]]:
        """The table rows of those that are read, and the parameters."""
        return self._known.values()

    @property
    def gradients_read(self) -> int:
        """How many parameters had a gradient so far."""
        return len(self._read) - len(self._missing)

    @property
    def expected(self) -> int:
        """How many trainable parameters there are."""
        return sum(parameter.requires_grad for _, parameter in self._known.values())

    def weights(self) -> None:
        """The weights before any update, and the state of every parameter."""
        for row, parameter in self._known.values():
            self._rows.flag("requires_grad", row, float(parameter.requires_grad))
            self._rows.flag("in_optimizer", row, 0.0)
            self._rows.flag("stale_in_optimizer", row, 0.0)
            if parameter.requires_grad:
                # If it turns out to be in no optimizer its gradient is nobody's; but whether
                # one arrived tells a forgotten parameter from an unused one.
                self._rows.flag("grad_missing", row, float(parameter.grad is None))
            self._rows.add("weight", row, statistics.squares(parameter))

    def read(self, parameters: Sequence[Tensor], held: Sequence[Tensor], left: Deferred) -> None:
        """The gradients, as an optimizer is given them; `held` are all that one will be given.

        `left` is what the optimizer still has to do to them.
        """
        for parameter in held:
            known = self._known.get(id(parameter))
            if known is not None:
                self._rows.flag("in_optimizer", known[0], 1.0)
        for row in self._roster.left_behind(parameters):
            self._rows.flag("stale_in_optimizer", row, 1.0)
        self._roster.former.keep(held)
        given = [self._known[id(p)] for p in parameters if id(p) in self._known]
        self._forget({row for row, _ in given} & self._read - self._updated)
        earlier = len(self._pending)
        for row, parameter in given:
            if parameter.requires_grad and row not in self._read:
                self._read.add(row)
                self._read_one(row, parameter, left)
        self._guard.run(HISTOGRAMS, self._count, self._pending[earlier:])

    def _forget(self, again: set[int]) -> None:
        if not again:
            return
        kinds = {"gradient", "touched", "magnitudes", "weight"}
        entries = self._rows.entries
        self._rows.entries = [e for e in entries if not (e[0] in kinds and e[1] in again)]
        self._pending = [entry for entry in self._pending if entry.row not in again]
        self._read -= again
        self._missing -= again
        for row, parameter in self._known.values():
            if row in again:
                self._rows.add("weight", row, statistics.squares(parameter))

    def _read_one(self, row: int, parameter: Tensor, left: Deferred) -> None:
        gradient = parameter.grad
        self._rows.flag("grad_missing", row, float(gradient is None))
        if gradient is None:
            self._missing.add(row)
            return
        if not is_laid_out_alike(gradient, parameter):
            message = (
                "gradients that lie on other processes than their parameters, or that are still to "
                "be summed over processes, are not recorded"
            )
            self._guard.say("parameters", message, aloud=False)
            return
        if gradient.is_sparse:
            # Once, for all that is asked of it.
            gradient = gradient.coalesce()
        moments = statistics.moments(gradient)
        if left.scale is not None:
            moments = unscaled(moments, left.scale)
        if left.overflow is not None:
            moments = unless(left.overflow, moments)
        self._rows.add("gradient", row, moments)
        # Of rows that are split over processes, each knows a part.
        if row in self._embeddings and not groups(parameter):
            self._count_touched(row, gradient, left)
        if parameter.numel():
            # The gradient too: the optimizer may write into it, a closure renews it.
            coordinates = self._samples.coordinates(parameter)
            if gradient.is_sparse and coordinates is not None:
                # A sample of mostly idle rows says nothing, and a dense copy is too dear.
                return
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            before = self._samples.take(parameter, parameter)
            taken = self._samples.take(dense, parameter)
            dtype = taken.dtype
            if left.scale is not None:
                taken = divided(taken, left.scale)
            same = taken.dtype == dtype
            pending = _Pending(row, parameter, coordinates, before, taken, same, left.overflow)
            self._pending.append(pending)

    def _count_touched(self, row: int, gradient: Tensor, left: Deferred) -> None:
        touched = statistics.touched_rows(gradient)
        if left.overflow is not None:
            touched = touched.masked_fill(beside(left.overflow, touched), torch.nan)
        self._rows.add("touched", row, touched, float(len(gradient)))

    def _count(self, read: Sequence[_Pending]) -> None:
        """The histograms of the gradients, from the copies that the updates need anyway."""
        alike: dict[tuple[torch.device, torch.dtype], list[_Pending]] = {}
        for entry in read:
            key = (entry.gradient.device, entry.gradient.dtype)
            alike.setdefault(key, []).append(entry)
        for entries in alike.values():
            counted = statistics.magnitudes(entry.gradient for entry in entries)
            for entry, counts in zip(entries, counted, strict=True):
                if not entry.in_own_dtype:
                    counts[-2] = torch.nan
                skipped = entry.skipped
                kept = counts if skipped is None else counts * ~beside(skipped, counts)
                self._rows.add("magnitudes", entry.row, kept)

    def updates(self, parameters: Iterable[Tensor] | None = None) -> None:
        """What the step changed, of these parameters (None: of all that were read)."""
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        ended = self._known.keys() if wanted is None else self._known.keys() & wanted
        self._updated |= {self._known[key][0] for key in ended}
        still_pending = []
        for entry in self._pending:
            if wanted is not None and id(entry.parameter) not in wanted:
                still_pending.append(entry)
                continue
            after = statistics.plain(entry.parameter)
            if entry.coordinates is not None:
                after = after[entry.coordinates]
            products = statistics.update_products(entry.before, after, entry.gradient)
            if entry.skipped is not None:
                products = products.masked_fill(beside(entry.skipped, products), torch.nan)
            # Of a parameter that is split a process may hold nothing.
            scale = statistics.plain(entry.parameter).numel() / max(entry.before.numel(), 1)
            self._rows.add("update", entry.row, products, scale)
        self._pending = still_pending


class CoordinateSamples:
    """A fixed pseudo-random sample of coordinates for each large tensor size."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, torch.device], Tensor] = {}

    def coordinates(self, parameter: Tensor) -> Tensor | None:
        """The sampled coordinates of the flat parameter; None: all of them."""
        numel = _entries(parameter)
        if numel <= _EXACT_UPTO:
            return None
        key = (numel, parameter.device)
        if key not in self._by_size:
            # Its own generator: the user's random numbers stay what they are.
            generator = torch.Generator("cpu").manual_seed(numel)
            drawn = torch.randint(numel, (_SAMPLE,), generator=generator, device="cpu")
            self._by_size[key] = drawn.to(parameter.device, non_blocking=True)
        return self._by_size[key]

    def take(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A copy of the tensor's entries at the parameter's sampled coordinates."""
        flat = statistics.plain(tensor)
        coordinates = self.coordinates(parameter)
        return flat.clone() if coordinates is None else flat[coordinates]
