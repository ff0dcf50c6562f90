"""Gradients, weights and updates of the parameters, as an optimizer's step is given them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradscope.capture import fused, statistics
from gradscope.capture.entities import Roster
from gradscope.capture.guard import HISTOGRAMS, PROBES, Guard
from gradscope.capture.probes import ParameterProbes, Sampled
from gradscope.capture.recorder import Rows
from gradscope.capture.samples import CoordinateSamples, entries
from gradscope.capture.scaling import Deferred, beside, divided, unless, unscaled
from gradscope.capture.shards import groups, is_laid_out_alike

# Entries: half a megabyte of gradients.
_BATCH = 131_072


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

    samples: what updates and histograms are measured on; None: neither is wanted.
    probes: what else is looked at, if anything.
    """

    def __init__(
        self,
        roster: Roster,
        rows: Rows,
        samples: CoordinateSamples | None,
        probes: ParameterProbes | None,
        guard: Guard,
        *,
        split_only: bool = False,
    ) -> None:
        self._guard = guard
        self._rows = rows
        self._samples = samples
        self._probes = probes
        # Whether histograms of weights and updates are wanted, too.
        self._deep = samples is not None and samples.count_everything
        self._roster = roster
        self._known = roster.parameters
        if split_only:
            self._known = {key: entry for key, entry in self._known.items() if groups(entry[1])}
        self._embeddings = roster.embeddings
        if samples is not None:
            samples.fit(parameter for _, parameter in self._known.values())
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
        self._add_weights(list(self._known.values()))
        if self._probes is not None:
            matrices = [(r, p) for r, p in self._known.values() if r in self._roster.matrices]
            self._guard.run(PROBES, self._probes.weights, self._rows, matrices)

    def _add_weights(self, known: Sequence[tuple[int, Tensor]]) -> None:
        found = statistics.squares_of([parameter for _, parameter in known])
        for (row, _), numbers in zip(known, found, strict=True):
            self._rows.add("weight", row, numbers)

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
        found = []
        for row, parameter in given:
            if parameter.requires_grad and row not in self._read:
                self._read.add(row)
                gradient = self._gradient(row, parameter)
                if gradient is not None:
                    found.append((row, parameter, gradient))
        earlier = len(self._pending)
        # What is measured is still in the cache when its sample is taken.
        for batch in [found] if self._samples is None else _batches(found):
            self._measure(batch, left)
            if self._samples is not None:
                self._pending += self._take(batch, left, self._samples)
        self._guard.run(HISTOGRAMS, self._count, self._pending[earlier:])
        if self._probes is not None:
            read = [Sampled(e.row, e.parameter, e.gradient, e.skipped) for e in self._pending]
            self._guard.run(PROBES, self._probes.gradients, self._rows, read[earlier:])

    def _forget(self, again: set[int]) -> None:
        if not again:
            return
        kinds = {"gradient", "touched", "magnitudes", "weight", "weight_magnitudes"}
        kinds |= {"previous", "balance"}
        kept = [e for e in self._rows.entries if not (e[0] in kinds and e[1] in again)]
        self._rows.entries = kept
        self._pending = [entry for entry in self._pending if entry.row not in again]
        self._read -= again
        self._missing -= again
        self._add_weights([entry for entry in self._known.values() if entry[0] in again])

    def _gradient(self, row: int, parameter: Tensor) -> Tensor | None:
        """What the optimizer is given of it, if that can be measured."""
        gradient = parameter.grad
        self._rows.flag("grad_missing", row, float(gradient is None))
        if gradient is None:
            self._missing.add(row)
        elif not is_laid_out_alike(gradient, parameter):
            message = (
                "gradients that lie on other processes than their parameters, or that are still to "
                "be summed over processes, are not recorded"
            )
            self._guard.say("parameters", message, aloud=False)
            return None
        elif gradient.is_sparse:
            # Once, for all that is asked of it.
            return gradient.coalesce()
        return gradient

    def _measure(self, found: Sequence[tuple[int, Tensor, Tensor]], left: Deferred) -> None:
        all_moments = statistics.moments_of([gradient for _, _, gradient in found])
        if fused.problem is not None:
            message = f"tensors on a GPU are read one by one, which takes longer: {fused.problem}"
            self._guard.say("parameters", message, aloud=False)
        for (row, parameter, gradient), moments in zip(found, all_moments, strict=True):
            given = moments if left.scale is None else unscaled(moments, left.scale)
            if left.overflow is not None:
                given = unless(left.overflow, given)
            self._rows.add("gradient", row, given)
            # Of rows that are split over processes, each knows a part.
            if row in self._embeddings and not groups(parameter):
                self._count_touched(row, gradient, left)

    @staticmethod
    def _take(
        found: Sequence[tuple[int, Tensor, Tensor]], left: Deferred, samples: CoordinateSamples
    ) -> list[_Pending]:
        """Copies of weight and gradient: the optimizer may write into both, a closure renews it."""
        pending = []
        for row, parameter, gradient in found:
            coordinates = samples.coordinates(parameter)
            # A sample of mostly idle rows says nothing, and a dense copy is too dear.
            if not parameter.numel() or (gradient.is_sparse and coordinates is not None):
                continue
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            before = samples.take(parameter, parameter)
            taken = samples.take(dense, parameter)
            dtype = taken.dtype
            if left.scale is not None:
                taken = divided(taken, left.scale)
            same = taken.dtype == dtype
            pending.append(
                _Pending(row, parameter, coordinates, before, taken, same, left.overflow)
            )
        return pending

    def _count_touched(self, row: int, gradient: Tensor, left: Deferred) -> None:
        touched = statistics.touched_rows(gradient)
        if left.overflow is not None:
            touched = touched.masked_fill(beside(left.overflow, touched), torch.nan)
        self._rows.add("touched", row, touched, float(len(gradient)))

    def _count(self, read: Sequence[_Pending]) -> None:
        """The histograms of the gradients, from the copies that the updates need anyway."""
        counted = statistics.magnitudes_of([entry.gradient for entry in read])
        for entry, counts in zip(read, counted, strict=True):
            if not entry.in_own_dtype:
                counts[-2] = torch.nan
            self._rows.add("magnitudes", entry.row, _unless_skipped(entry, counts))
        if self._deep:
            whole = self._whole(read)
            counted = statistics.magnitudes_of([entry.before for entry in whole])
            for entry, counts in zip(whole, counted, strict=True):
                self._rows.add("weight_magnitudes", entry.row, counts)

    def _whole(self, among: Sequence[_Pending]) -> list[_Pending]:
        """Those that no other process holds a part of."""
        whole = [entry for entry in among if not groups(entry.parameter)]
        if len(whole) < len(among):
            message = "no histograms of weights and updates of parameters split over processes"
            self._guard.say(HISTOGRAMS, message, aloud=False)
        return whole

    def _count_updates(self, changes: Sequence[tuple[_Pending, Tensor]]) -> None:
        whole = {entry.row for entry in self._whole([entry for entry, _ in changes])}
        kept = [(entry, change) for entry, change in changes if entry.row in whole]
        counted = statistics.magnitudes_of([change for _, change in kept])
        for (entry, _), counts in zip(kept, counted, strict=True):
            self._rows.add("update_magnitudes", entry.row, _unless_skipped(entry, counts))

    def updates(self, parameters: Iterable[Tensor] | None = None) -> None:
        """What the step changed, of these parameters (None: of all that were read)."""
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        updated = self._known.keys() if wanted is None else self._known.keys() & wanted
        self._updated |= {self._known[key][0] for key in updated}
        ended = [e for e in self._pending if wanted is None or id(e.parameter) in wanted]
        if wanted is not None:
            self._pending = [e for e in self._pending if id(e.parameter) not in wanted]
        else:
            self._pending = []
        changes = []
        for entry in ended:
            after = statistics.plain(entry.parameter)
            if entry.coordinates is not None:
                after = after.index_select(0, entry.coordinates)
            products = statistics.update_products(entry.before, after, entry.gradient)
            # Of a parameter that is split a process may hold nothing.
            scale = entries(entry.parameter) / max(entry.before.numel(), 1)
            skipped = entry.skipped
            if skipped is None:
                self._rows.add("update", entry.row, products, scale)
            else:
                unknown = products.masked_fill(beside(skipped, products), torch.nan)
                self._rows.add("update", entry.row, unknown, scale)
            if self._deep:
                changes.append((entry, _difference(after, entry.before)))
        if changes:
            self._guard.run(HISTOGRAMS, self._count_updates, changes)

    def states(self, optimizer: Optimizer) -> None:
        """What the optimizer, whose step has ended, holds of the parameters."""
        if self._probes is not None:
            self._guard.run(PROBES, self._probes.states, self._rows, optimizer, self._known)


def _difference(after: Tensor, before: Tensor) -> Tensor:
    """In no less than single precision, where that of half precision is exact."""
    if after.dtype.itemsize < torch.float32.itemsize:
        return after.to(torch.float32) - before.to(torch.float32)
    return after - before


def _unless_skipped(entry: _Pending, counts: Tensor) -> Tensor:
    """The counts; none where the optimizer leaves the parameter as it is."""
    return counts if entry.skipped is None else counts * ~beside(entry.skipped, counts)


def _batches(
    found: Sequence[tuple[int, Tensor, Tensor]],
) -> Iterator[Sequence[tuple[int, Tensor, Tensor]]]:
    first = filled = 0
    for place, (_, _, gradient) in enumerate(found):
        # Elsewhere the fewer launches the better.
        filled += gradient.numel() if gradient.is_cpu else 0
        if filled >= _BATCH:
            yield found[first : place + 1]
            first, filled = place + 1, 0
    yield found[first:]
