"""What the model's parameters were before they were replaced: an optimizer may still hold it."""

from collections.abc import Callable, Iterable, Iterator
from weakref import ReferenceType, ref

from torch import Tensor, nn

from gradscope.record import Entity


class Former:
    """The parameters that a model has had, by identity; none is kept alive for it."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[ReferenceType[Tensor], Entity]] = {}
        self._present: frozenset[int] = frozenset()

    def remember(
        self,
        owned: Iterable[tuple[str, nn.Module, Tensor]],
        describe: Callable[[str, nn.Module, Tensor], Entity],
    ) -> None:
        """Note the model's parameters as they are now."""
        # The identity of what has gone may be another tensor's by now.
        seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
        present = set()
        for name, owner, parameter in owned:
            present.add(id(parameter))
            if id(parameter) not in seen:
                seen[id(parameter)] = (ref(parameter), describe(name, owner, parameter))
        self._seen, self._present = seen, frozenset(present)

    def among(self, tensors: Iterable[Tensor]) -> Iterator[Entity]:
        """What those of the tensors were that the model had once, and has no more."""
        for tensor in tensors:
            if id(tensor) not in self._present and self.knows(tensor):
                yield self._seen[id(tensor)][1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether the model has it, or had it once."""
        entry = self._seen.get(id(tensor))
        return entry is not None and entry[0]() is tensor
