"""Which forwards are repeated by activation checkpointing, and which part of the first they are.

A repeat runs inside the backward, without the modules around the checkpoint, so that who makes a
call can't be told from what runs. But it makes the calls of the first run, in their order.
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from gradscope.capture.context import last_node, replayed_node

Place = TypeVar("Place")

# torch.utils.checkpoint packs what a part saves for its backward with a hook that holds this, by a
# weak reference in the repeat. None of it has a public name; without it the part is not known.
_FRAME = "_CheckpointFrame"
# Numbers of nodes are given once, but nobody says when a graph is gone.
_MOST_PARTS = 10_000
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # noqa: SLF001


def is_replay() -> bool:
    """Whether this runs inside a backward."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001  (no public name)


def is_discarded() -> bool:
    """Whether it runs only for what it saves: no gradient ever comes to what is computed here."""
    return is_replay() and replayed_node() is None


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Part(Generic[Place]):
    """The calls of a checkpointed part, and how far which repeat of it has come."""

    places: list[Place] = field(default_factory=list)
    repeat: object = None
    number: int = 0

    def next(self, repeat: object) -> tuple[Place] | None:
        if repeat != self.repeat:
            self.repeat, self.number = repeat, 0
        self.number += 1
        return (self.places[self.number - 1],) if self.number <= len(self.places) else None


class Replays(Generic[Place]):
    """The places of the calls in checkpointed parts, as their first run made them."""

    def __init__(self) -> None:
        self._parts: weakref.WeakKeyDictionary[object, _Part[Place]] = weakref.WeakKeyDictionary()
        # Of re-entrant checkpoints, by the number of the node that repeats the part.
        self._reentrant: dict[int, _Part[Place]] = {}

    def note(self, place: Place) -> None:
        """A call is made that a backward may repeat."""
        frame = _frame()
        if frame is not None:
            self._parts.setdefault(frame[0], _Part()).places.append(place)
        elif not torch.is_grad_enabled():
            # A re-entrant one runs without gradients, so that its own is the last node there is.
            if len(self._reentrant) > _MOST_PARTS:
                self._reentrant.clear()
            self._reentrant.setdefault(last_node(), _Part()).places.append(place)

    def known(self) -> tuple[Place] | None:
        """Which call is repeated, in a tuple; None where that can't be told."""
        frame, node = _frame(), replayed_node()
        if frame is not None and frame[0] in self._parts:
            return self._parts[frame[0]].next(frame[1])
        if node is not None and node in self._reentrant:
            task = torch._C._current_graph_task_id()  # noqa: SLF001
            return self._reentrant[node].next(task)
        return None


def _frame() -> tuple[object, object] | None:
    """The checkpointed part that runs, and what tells one run of it from another."""
    hooks = None if _top_hooks is None else _top_hooks(True)  # noqa: FBT003
    if hooks is None:
        return None
    pack: Callable[..., object] = inspect.unwrap(hooks[0])
    held = [_strong(cell.cell_contents) for cell in getattr(pack, "__closure__", None) or ()]
    frames = [value for value in held if type(value).__name__ == _FRAME]
    # A repeat's hook also holds the number of the backward that it is for.
    return (frames[0], [v for v in held if v is not frames[0]]) if frames else None


def _strong(held: object) -> object:
    return held() if isinstance(held, weakref.ReferenceType) else held
