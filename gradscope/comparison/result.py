"""What a comparison measured: cells, configurations in tiers, and how to look at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

F64 = NDArray[np.float64]

LN10 = float(np.log(10))
# What counts as the start of a training.
EARLY_STEPS = 30


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """Which initialization, which activation, which mitigation."""

    initialization: str
    activation: str = "own"
    mitigation: str = "none"

    def __str__(self) -> str:
        parts = [self.initialization, self.activation]
        return " + ".join(parts if self.mitigation == "none" else [*parts, self.mitigation])


@dataclass(frozen=True, eq=False, slots=True)
class Cell:
    """What one seed of a configuration gave. NaN means not measured.

    gradient: (L,) mean over samples of ln ‖∂loss/∂h‖ at the L layers, from the input to the
    output; -inf where it is exactly zero. variance: (L,) of the same pre-activations h.
    slope: of ln ‖∂loss/∂h‖² per layer towards the input, ln χ: negative where the gradient
    shrinks; first and last layer aside. time_slope: the same per time step of a recurrent layer.
    spread: standard deviation of ln ‖∂loss/∂h‖² around the line. drift: of ln variance per layer,
    from the input. dead, saturated: fraction of units whose φ′ is 0, and of values whose |φ′| is
    below 1 % of the largest. similarity: mean cosine between samples at the last layer but one.
    update_ratio: median over weights of ‖gradient‖ / ‖weight‖. conditioning: m₂/m₁² of the squared
    singular values of the network's Jacobian, 1 at isometry. plug_in: ln χ from the measured φ′².
    failure: why it can't train, or None; where set, what could be measured is still there.
    trained: the loss after training, at the best of the learning rates. early: the mean loss of
    the first thirty steps, at the rate that is best for them.
    """

    name: Name
    seed: int
    loss: float = np.nan
    gradient: F64 = field(default_factory=lambda: np.empty(0))
    variance: F64 = field(default_factory=lambda: np.empty(0))
    slope: float = np.nan
    time_slope: float = np.nan
    spread: float = np.nan
    drift: float = np.nan
    dead: float = np.nan
    saturated: float = np.nan
    similarity: float = np.nan
    update_ratio: float = np.nan
    conditioning: float = np.nan
    plug_in: float = np.nan
    weight_variance: float = np.nan
    bias_variance: float = np.nan
    time_steps: int = 0
    trained: float = np.nan
    learning_rate: float = np.nan
    early: float = np.nan
    failure: str | None = None

    @property
    def decades(self) -> float:
        """By how many powers of ten the gradient's norm grows from the last layer to the first."""
        return self.slope * max(len(self.gradient) - 1, 1) / (2 * LN10)

    @property
    def time_decades(self) -> float:
        """The same from the last time step to the first."""
        return self.time_slope * max(self.time_steps - 1, 1) / (2 * LN10)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % interval (Student's t); NaN ends where there is one seed."""

    mean: float
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True, eq=False, slots=True)
class Configuration:
    """A configuration's seeds, and its place.

    tier: 1 is best; those of one tier can't be told apart. score: decades of the gradient's norm,
    lost ones doubly; lower is better, inf where it can't train. arrives: whether the
    gradient does, by a score of at most 1. theory: ln χ per layer by
    mean-field theory, NaN where the model is no plain chain of layers; remark: why.
    """

    name: Name
    cells: tuple[Cell, ...]
    tier: int
    score: Interval
    growth: Interval
    theory: float = np.nan
    remark: str = ""
    failure: str | None = None
    snippet: str = ""
    arrives: bool = False

    def mean(self, quantity: str) -> float:
        """The mean of a cell's number over seeds, NaN where none has it."""
        values = np.array([getattr(cell, quantity) for cell in self.cells], np.float64)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else np.nan

    @property
    def theory_error(self) -> float:
        """What was measured less what theory says, in ln χ per layer."""
        return self.growth.mean - self.theory

    @property
    def gradient(self) -> F64:
        """(seeds, L): ln ‖∂loss/∂h‖ by layer, from the input to the output."""
        found = [cell.gradient for cell in self.cells if len(cell.gradient)]
        return np.stack(found) if found else np.empty((0, 0))

    @property
    def depth(self) -> int:
        """Layers at which the gradient was read."""
        return max((len(cell.gradient) for cell in self.cells), default=0)


@dataclass(frozen=True, slots=True)
class Verification:
    """A short training of the recommended configuration beside the model's own."""

    steps: int
    seeds: int
    recommended: float
    own: float
    better: bool


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """Configurations of a model, best first.

    left_out: configurations that don't exist for this model, and why. left: parameters and
    activations that were left alone, and why. layers: names of the L layers. agreement: rank
    correlation (Spearman) of tier and loss after training, NaN without training.
    """

    model: str
    configurations: tuple[Configuration, ...]
    layers: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: Mapping[Name, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    agreement: float = np.nan
    verification: Verification | None = None
    missing: int = 0
    seconds: float = np.nan

    @property
    def best(self) -> Configuration:
        """The first of the first tier."""
        return self.configurations[0]

    @property
    def first_tier(self) -> tuple[Configuration, ...]:
        """Those that can't be told from the best."""
        return tuple(c for c in self.configurations if c.tier == 1)

    @property
    def own(self) -> Configuration | None:
        """The model as it is, if that was asked for."""
        return next((c for c in self.configurations if c.name == Name("own")), None)

    @property
    def complete(self) -> bool:
        """Whether all cells were measured; an interruption leaves some out."""
        return self.missing == 0

    def frame(self) -> "pd.DataFrame":
        """One row per configuration, best first."""
        from gradscope.comparison.table import frame  # noqa: PLC0415  (pandas when asked)

        return frame(self)

    def print(self) -> None:
        """The table, what theory says, and what to do, in the terminal."""
        from gradscope.comparison.text import print_comparison  # noqa: PLC0415

        print_comparison(self)

    def write(self, path: str | Path) -> Path:
        """Write one file: .html, .csv or .txt by its suffix; returns where it is."""
        from gradscope.comparison.writing import write  # noqa: PLC0415

        return write(self, Path(path))


def as_json(cell: Cell) -> dict[str, Any]:
    """A cell as plain values; NaN and infinities as Python's json writes them."""
    made: dict[str, Any] = {}
    for key in Cell.__slots__:
        value = getattr(cell, key)
        if isinstance(value, Name):
            value = [value.initialization, value.activation, value.mitigation]
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        made[key] = value
    return made


def from_json(made: Mapping[str, Any]) -> Cell:
    """The inverse of `as_json`."""
    values = dict(made)
    values["name"] = Name(*values["name"])
    for key in ("gradient", "variance"):
        values[key] = np.array(values[key], np.float64)
    return Cell(**values)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t over seeds."""
    from scipy import stats  # noqa: PLC0415  (half a second, for loading a cell alone)

    kept = np.array(values, np.float64)
    if not len(kept) or not np.isfinite(kept).all():
        return Interval(float(kept.mean()) if len(kept) else np.nan)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean)
    half = float(stats.t.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Interval(mean, mean - half, mean + half)
