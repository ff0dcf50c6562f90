"""What the model's parameters were before they were replaced: an optimizer may still hold it."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from gradscope.record import Entity


class Former:
    """The parameters that a model has had, by identity.

    Not by weak references: where there is one, torch refuses to convert a parameter by swapping.
    So what is replaced lives on until the next recorded step, and then as long as an optimizer
    holds it, not longer.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Entity]] = {}
        self._present: frozenset[int] = frozenset()

    def remember(
        self,
        owned: Iterable[tuple[str, nn.Module, Tensor]],
        describe: Callable[[str, nn.Module, Tensor], Entity],
    ) -> None:
        """Note the model's parameters as they are now."""
        present = set()
        for name, owner, parameter in owned:
            present.add(id(parameter))
            if id(parameter) not in self._seen:
                self._seen[id(parameter)] = (parameter, describe(name, owner, parameter))
        self._present = frozenset(present)

    def among(self, tensors: Iterable[Tensor]) -> Iterator[Entity]:
        """What those of the tensors were that the model had once, and has no more."""
        for tensor in tensors:
            if id(tensor) not in self._present and self.knows(tensor):
                yield self._seen[id(tensor)][1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether the model has it, or had it once."""
        return id(tensor) in self._seen

    def keep(self, held: Iterable[Tensor]) -> None:
        """Forget what neither the model has nor is among these."""
        wanted = self._present.union(map(id, held))
        self._seen = {key: entry for key, entry in self._seen.items() if key in wanted}
