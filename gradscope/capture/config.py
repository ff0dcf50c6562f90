"""What watch() was asked for, checked before training begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

from gradscope.analysis.finding import Finding
from gradscope.capture.cadence import BUDGET
from gradscope.errors import ConfigError, ConfigTypeError

Level = Literal["parameters", "full", "deep"]
LEVELS: tuple[str, ...] = get_args(Level)

# A function that is told of findings, or how training ends at the first error.
OnFinding: TypeAlias = Callable[[Finding], object] | Literal["stop"]


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """The settings of one watch, valid by construction."""

    every: int | None = None
    budget: float = BUDGET
    level: str = "full"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    loss_is_progress: bool = True
    on_finding: OnFinding | None = None

    # A unit counts as dead when it was zero for this many recorded samples in a row. A healthy
    # unit that fires for 2 % of the samples stays silent that long once in 175 times.
    dead_after_samples: int = 256
    # A cell called once per time step would fill the tables; beyond this, the middle and the last.
    max_uses: int = 16
    # Gradients along time take another forward and backward of the recurrent modules. As most
    # steps are not recorded, one in ten that are is one in a hundred: 1 % of what they cost.
    time_gradients_every: int = 10

    def __post_init__(self) -> None:
        if self.every is not None:
            if isinstance(self.every, bool) or not isinstance(self.every, int):
                message = f"every={self.every!r} is not a whole number of steps"
                raise ConfigTypeError(message)
            if self.every < 1:
                message = f"every={self.every} records nothing; 1 records each step, 10 every tenth"
                raise ConfigError(message)
        if self.level not in LEVELS:
            message = f"level={self.level!r} is not available; choose from {', '.join(LEVELS)}"
            raise ConfigError(message)
        _check_on_finding(self.on_finding)

    @property
    def is_full(self) -> bool:
        """Whether more than gradients and weights is wanted: updates, histograms, outputs."""
        return self.level != "parameters"

    @property
    def counts_everything(self) -> bool:
        """Whether histograms are wanted of more than the gradients."""
        return self.level == "deep"

    def selects(self, *names: str) -> bool:
        """Whether what has the qualified name, or several that apply to it, is to be watched."""
        if self.include and not _any_matches(names, self.include):
            return False
        return not _any_matches(names, self.exclude)


def _any_matches(names: Sequence[str], among: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in among)


def _check_on_finding(on_finding: object) -> None:
    if isinstance(on_finding, str):
        if on_finding != "stop":
            message = (
                f"on_finding={on_finding!r} is not available; choose 'stop', or give a function "
                "that is called with each finding"
            )
            raise ConfigError(message)
    elif on_finding is not None and not callable(on_finding):
        message = (
            f"on_finding={on_finding!r} is neither a function that is called with each finding "
            "nor 'stop'"
        )
        raise ConfigTypeError(message)


def patterns(argument: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
        message = f"{argument}={value!r} must be a pattern or a sequence of patterns (fnmatch)"
        raise ConfigTypeError(message)
    return tuple(value)
