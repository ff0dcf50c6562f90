"""What ran without gradients in a forward that began with them."""

from torch import nn

from gradscope.capture.context import last_node, replayed_node
from gradscope.capture.recorder import Rows


class SetAside:
    """It is measured, and kept until a replay shows that a checkpoint did it, and no `no_grad`.

    With the number of the node that was made last: in a checkpoint, its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[nn.Module, int], list[tuple[int, Rows]]] = {}

    def keep(self, module: nn.Module, row: int, rows: Rows) -> None:
        """The module has run without gradients: `rows` is what was measured, of the table's row."""
        self._kept.setdefault((module, last_node()), []).append((row, rows))

    def replayed(self, module: nn.Module) -> tuple[int, Rows] | None:
        """What is known of the module's run that is repeated now."""
        node = replayed_node()
        waiting = None if node is None else self._kept.get((module, node))
        # The one that ran first is repeated first.
        return waiting.pop(0) if waiting else None

    def table_rows(self) -> set[int]:
        """Of what no replay came for."""
        return {row for entries in self._kept.values() for row, _ in entries}
