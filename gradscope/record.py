"""What was measured, as read-only arrays: Entity, Table, Histograms, Run."""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.floating[Any]]
# A mark that no zlib stream begins with; rows, first bin, the bin behind the last, bytes a count.
_PACKED = struct.Struct("<BIHHB")
_SPARSE = 1

StepArray = NDArray[np.int64]
CountArray = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing that is measured: a parameter, one use of a module, or a signal.

    `name` is the qualified name the model gives it; further uses of one module are called
    `name#1`, `name#2`. `depth` is the order of first execution, not of registration. `shape`
    is the parameter's, or that of the module's output when it was first recorded; `numel` are the
    real numbers that it holds: two for each complex one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    depth: int
    group: str
    type: str


@dataclass(frozen=True, eq=False)
class Table:
    """Entities × recorded steps × quantities. NaN means "not measured".

    `values` is float32 of shape (quantities, steps, entities), read-only.
    """

    entities: tuple[Entity, ...]
    steps: StepArray
    quantities: tuple[str, ...]
    values: FloatArray

    def __post_init__(self) -> None:
        expected = (len(self.quantities), len(self.steps), len(self.entities))
        if self.values.shape != expected:
            message = f"a table's values have shape {self.values.shape}, expected {expected}"
            raise ConfigError(message)
        self.values.flags.writeable = False
        self.steps.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew: of an array that is read-only a copy is not.
        return Table, (self.entities, self.steps, self.quantities, self.values)

    def __getitem__(self, quantity: str) -> FloatArray:
        """The quantity as an array of shape (steps, entities)."""
        try:
            index = self.quantities.index(quantity)
        except ValueError:
            near = get_close_matches(quantity, self.quantities, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.quantities)}"
            )
            message = f"no quantity {quantity!r} in this table; {hint}"
            raise ConfigError(message) from None
        result: FloatArray = self.values[index]
        return result

    def __contains__(self, quantity: object) -> bool:
        return quantity in self.quantities

    def __repr__(self) -> str:
        # That of a dataclass would print every entity, into every notebook.
        shape = f"{len(self.steps)} steps × {len(self.entities)} entities"
        return f"Table({shape} × {len(self.quantities)} quantities)"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The entities' names, in the order of the columns."""
        return tuple(entity.name for entity in self.entities)

    def frame(self, quantity: str | None = None) -> "pd.DataFrame":
        """A tidy DataFrame: one row per recorded step and entity, one column per quantity.

        With a quantity it is wide: one row per recorded step, one column per entity. NaN: not
        measured. Raises ConfigError for a quantity that is not in this table.
        """
        chosen = None if quantity is None else self[quantity].copy()
        import pandas as pd  # noqa: PLC0415  (a second to import; only exports need it)

        if chosen is not None:
            index = pd.Index(self.steps.copy(), name="step")
            return pd.DataFrame(chosen, index, pd.Index(self.names, dtype=object, name="name"))
        steps, entities = len(self.steps), len(self.entities)
        columns: dict[str, Any] = {
            "step": np.repeat(self.steps, entities),
            "name": np.tile(np.array(self.names, dtype=object), steps),
        }
        for attribute in ("depth", "group", "type"):
            values = [getattr(entity, attribute) for entity in self.entities]
            columns[attribute] = np.tile(np.array(values, dtype=object), steps)
        for name in self.quantities:
            columns[name] = self[name].reshape(-1)
        frame: pd.DataFrame = pd.DataFrame(columns).astype({"depth": "int64"})
        return frame


@dataclass(frozen=True, eq=False)
class Histograms:
    """How many entries of each tensor have which magnitude, step by step.

    Bin i counts the entries x with 2**(lowest + i) ≤ |x| < 2**(lowest + i + 1); the first and the
    last bin also hold what lies beyond. Zeros and non-finite entries are in no bin. Of complex
    tensors the real and the imaginary parts are counted, of large ones a sample of the entries
    (`run.meta["sampling"]`). Nothing is counted of parameters without a gradient (the table's
    `grad_norm` is NaN), nor with a sparse one that is large.
    """

    entities: tuple[Entity, ...]
    steps: StepArray
    lowest: int
    bins: int
    # One compressed array of counts per step: few of the bins hold anything.
    packed: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.packed) != len(self.steps):
            message = f"{len(self.packed)} histograms for {len(self.steps)} steps"
            raise ConfigError(message)
        self.steps.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Histograms, (self.entities, self.steps, self.lowest, self.bins, self.packed)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of parameters or modules, in the order of the rows."""
        return tuple(entity.name for entity in self.entities)

    @cached_property
    def edges(self) -> FloatArray:
        """The edges of the bins as exponents of two, of shape (bins + 1)."""
        return np.arange(self.lowest, self.lowest + self.bins + 1, dtype=np.float64)

    def __repr__(self) -> str:
        return f"Histograms({len(self.steps)} steps × {len(self.entities)} entities)"

    def at(self, index: int) -> CountArray:
        """The counts at the index-th of `steps`, of shape (entities, bins)."""
        counts = np.zeros((len(self.entities), self.bins), np.uint32)
        known = unpack_counts(self.packed[index], self.bins)[: len(self.entities)]
        counts[: len(known)] = known
        return counts

    def __getitem__(self, name: str) -> CountArray:
        """The counts of one of them, of shape (steps, bins)."""
        if name not in self.names:
            near = get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"no histogram of {name!r}{hint}"
            raise ConfigError(message)
        row = self.names.index(name)
        found = [self.at(index)[row] for index in range(len(self.steps))]
        return np.stack(found) if found else np.zeros((0, self.bins), np.uint32)

    def __bool__(self) -> bool:
        return len(self.steps) > 0


def pack_counts(counts: CountArray) -> bytes:
    """The counts (entities × bins) in few bytes: which are not zero, a bit each; then those."""
    held = np.flatnonzero(counts.any(axis=0))
    first, stop = (int(held[0]), int(held[-1]) + 1) if held.size else (0, 0)
    within = counts[:, first:stop]
    nonzero = within != 0
    found = within[nonzero]
    # Nearly always they are those of a sample.
    width = 2 if not found.size or int(found.max()) < 1 << 16 else 4
    head = _PACKED.pack(_SPARSE, len(counts), first, stop, width)
    return b"".join((head, np.packbits(nonzero).tobytes(), found.astype(f"<u{width}").tobytes()))


def unpack_counts(packed: bytes, bins: int) -> CountArray:
    """What `pack_counts` was given; raises ValueError where it can't be that.

    Also of whole rows in a zlib stream, as they were first written.
    """
    if packed[:1] != bytes([_SPARSE]):
        return np.frombuffer(zlib.decompress(packed), "<u4").reshape(-1, bins)
    if len(packed) < _PACKED.size:
        message = f"{len(packed)} bytes of counts"
        raise ValueError(message)
    _, rows, first, stop, width = _PACKED.unpack_from(packed)
    inside = rows * (stop - first)
    bits = np.frombuffer(packed, np.uint8, (inside + 7) // 8, _PACKED.size)
    nonzero = np.unpackbits(bits, count=inside).astype(bool).reshape(rows, stop - first)
    counts = np.zeros((rows, bins), np.uint32)
    counts[:, first:stop][nonzero] = np.frombuffer(
        packed, f"<u{width}", offset=_PACKED.size + bits.size
    )
    return counts


def check_counts(packed: bytes, bins: int) -> None:
    """Raise ValueError where `unpack_counts` would, in a tenth of its time."""
    if packed[:1] != bytes([_SPARSE]) or len(packed) < _PACKED.size:
        unpack_counts(packed, bins)
        return
    _, rows, first, stop, width = _PACKED.unpack_from(packed)
    behind = _PACKED.size + (rows * (stop - first) + 7) // 8
    # The bits beyond the last count are zero.
    nonzero = int.from_bytes(packed[_PACKED.size : behind]).bit_count()
    if not first <= stop <= bins or width not in {2, 4} or len(packed) != behind + nonzero * width:
        message = f"{len(packed)} bytes of counts of {rows} rows, bins {first} to {stop} of {bins}"
        raise ValueError(message)


def no_histograms() -> Histograms:
    """Of a run in which none were recorded."""
    return Histograms((), np.array([], np.int64), 0, 0, ())


@dataclass(frozen=True, eq=False)
class Run:
    """One watched training, read from its log.

    `steps` are all steps that were seen; `scalars` are aligned to them (NaN: not known at that
    step). The tables hold the recorded steps only. `histograms` are those of the gradients; `deep`
    holds those that `level="deep"` adds, by `weight`, `update`, `output` and `output_grad`. `meta`
    holds what does not change from step to step: model, optimizers, versions, cadence, `coverage`,
    `problems`, `left_out`, `dropout` (name → share), and where one was seen the autograd `graph` of
    a loss, or else of an output: breadth-first from its root, see `capture/graph.py`.
    """

    parameters: Table
    modules: Table
    signals: Table
    steps: StepArray
    scalars: Mapping[str, FloatArray]
    meta: Mapping[str, Any] = field(default_factory=dict)
    histograms: Histograms = field(default_factory=no_histograms)
    deep: Mapping[str, Histograms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for values in self.scalars.values():
            values.flags.writeable = False
        self.steps.flags.writeable = False
        object.__setattr__(self, "scalars", MappingProxyType(dict(self.scalars)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))
        object.__setattr__(self, "deep", MappingProxyType(dict(self.deep)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings can't be pickled; they are made anew.
        tables = self.parameters, self.modules, self.signals
        known = self.steps, dict(self.scalars), dict(self.meta), self.histograms, dict(self.deep)
        return Run, (*tables, *known)

    @property
    def recorded_steps(self) -> StepArray:
        """The steps at which the tables were recorded."""
        return self.parameters.steps

    def __repr__(self) -> str:
        model, seen = self.meta.get("model", "?"), len(self.steps)
        return f"Run({model!r}, {seen} steps seen, {len(self.recorded_steps)} recorded)"

    def _repr_html_(self) -> str:
        """The run in a notebook."""
        from gradscope import reporters  # noqa: PLC0415  (see docs/decisions/0004)

        return reporters.run_html(self)
