"""A training and what should be said of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Watched(Protocol):
    """What a program tells the tool that watches it, as `gradscope.Scope`."""

    def log(
        self,
        *,
        loss: Tensor | float | None = None,
        target: Tensor | None = None,
        output: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
        **scalars: Tensor | float,
    ) -> None:
        """What the program knows of the open step; most log the loss alone."""


class Watch(Protocol):
    """How a program is watched, as by `gradscope.watch`."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        criterion: nn.Module | None = None,
        *,
        scaler: object = None,
        loss_is_progress: bool = True,
    ) -> AbstractContextManager[Watched]:
        """Watch the model while the context is open."""


@dataclass(frozen=True, slots=True)
class Faulty:
    """A training with one fault, and its repaired twin.

    `accepts` are the codes that name the cause, the best first; one of them has to lead the
    report. `family` names the kind of fault: a family is in one half of the split as a whole.
    What no tool can see in the training, `observable=False`, is counted apart.
    """

    name: str
    family: str
    accepts: tuple[str, ...]
    source: str
    program: Callable[[Watch, bool], None]
    observable: bool = True

    def train(self, watch: Watch, *, repaired: bool = False) -> None:
        """Train; the caller has seeded torch."""
        self.program(watch, repaired)


@dataclass(frozen=True, slots=True)
class Healthy:
    """A training that learns, and may look sick; nothing but information may be said of it."""

    name: str
    family: str
    source: str
    program: Callable[[Watch], None]

    def train(self, watch: Watch) -> None:
        """Train; the caller has seeded torch."""
        self.program(watch)
