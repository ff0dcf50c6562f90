"""The names beside a picture: which of them fit, how they are shortened, which are marked."""

import re
from collections.abc import Iterable, Sequence

from matplotlib.axis import Axis
from matplotlib.text import Text

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.layers import module_of
from gradscope.record import Entity
from gradscope.reporters.wording import inert

MARK = "▸ "

# With more rows than this biases and norms are left out: they follow their layer's weight.
MANY_ROWS = 40
MINOR_GROUPS = frozenset({"bias", "norm"})
# Of each word all but its first letter and the numbers: conv2 → c2, self_attention → sa.
_REST = re.compile(r"(?<=[^\W\d_])[^\W\d_]+|_")


def elided(name: str, length: int) -> str:
    """The name within a length: its parts are abbreviated from the outside in, then cut.

    `encoder.layer4.12.attention.weight` becomes `e.l4.12.attention.weight`: the numbers and the
    end are what tells layers apart.
    """
    parts = inert(name).split(".")
    for index, part in enumerate(parts if len(parts) > 1 else ()):
        if len(".".join(parts)) <= length:
            break
        parts[index] = part if part.isdigit() else _REST.sub("", part)
    shown = ".".join(parts)
    if len(shown) <= length:
        return shown
    tail = (length - 1) * 2 // 3
    return f"{shown[: length - 1 - tail]}…{shown[-tail:]}"


def major_rows(entities: Sequence[Entity], rows: Iterable[int]) -> list[int]:
    """Of the rows those that are no bias or norm; all of them where there is no other."""
    listed = list(rows)
    return [row for row in listed if entities[row].group not in MINOR_GROUPS] or listed


def marked_rows(entities: Sequence[Entity], findings: Iterable[Finding]) -> list[int]:
    """The entities at which there is a warning or an error."""
    layers = {
        finding.layer
        for finding in findings
        if finding.layer and finding.severity is not Severity.INFO
    }
    return [
        index
        for index, entity in enumerate(entities)
        if any(same_layer(entity.name, layer) or _holds(layer, entity) for layer in layers)
    ]


def _holds(layer: str, entity: Entity) -> bool:
    """Whether it is a parameter of the layer: of the root itself, or of one of several uses."""
    return entity.kind == "parameter" and module_of(entity.name) == layer.partition("#")[0]


def same_layer(name: str, layer: str) -> bool:
    """Whether one is the other, or a part of it, such as a layer's weight."""
    return (
        name == layer
        or name.startswith((f"{layer}.", f"{layer}/"))
        or layer.startswith((f"{name}.", f"{name}/"))
    )


def shown_rows(rows: int, marked: Sequence[int], room: int) -> list[int]:
    """Which of the rows get a label where only `room` labels fit; the marked ones go first."""
    gap = max(1, -(-rows // room))
    taken: list[int] = []
    for row in [*marked, *range(0, rows, gap)]:
        if all(abs(row - other) >= gap for other in taken):
            taken.append(row)
    return sorted(taken)


def labelled(
    axis: Axis, entities: Sequence[Entity], shown: Sequence[int], marked: Sequence[int], length: int
) -> list[Text]:
    """Put the names of the shown entities on the axis, the marked ones in bold; returns them."""
    names = [elided(entities[row].name, length) for row in shown]
    texts = [MARK + name if row in marked else name for row, name in zip(shown, names, strict=True)]
    # A name is text, also where the user has TeX set everything.
    axis.set_ticks(shown, texts, parse_math=False, usetex=False)
    labels = axis.get_ticklabels()
    for row, label in zip(shown, labels, strict=True):
        if row in marked:
            label.set(fontweight="bold")
    return labels
