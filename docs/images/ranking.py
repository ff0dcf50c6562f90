"""Draws what benchmarks.ranking printed: `python -m docs.images.ranking RESULTS`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_HEAD = re.compile(r"^(\w+): \d+ layers")
_LINE = re.compile(
    r"^ +(\d+) +[\d.inf]+ +[-\d.nan]+ +[\d.]+ +([-\d.e]+) +\(([-\d.e]+), ([-\d.e]+)\)"
    r" +[\d.e-]+  (\S+ \+ \w+)"
)
_FIRST, _OTHERS, _INK = "#0072b2", "#8a8f98", "#1f2328"
# A loss below is none.
_FLOOR = 1e-5


@dataclass(frozen=True, slots=True)
class _Row:
    tier: int
    loss: float
    low: float
    high: float
    name: str


def read(text: str) -> dict[str, list[_Row]]:
    """The tables by model."""
    found: dict[str, list[_Row]] = {}
    model = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            model = head[1]
        elif row := _LINE.match(line):
            loss, low, high = map(float, row.group(2, 3, 4))
            found.setdefault(model, []).append(_Row(int(row[1]), loss, low, high, row[5]))
    return found


def draw(tables: dict[str, list[_Row]]) -> Figure:
    """A panel per model: best-ranked on top, the loss after training to the right."""
    columns = 3
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(12.5, 3.1 * rows), layout="constrained")
    for axes, (model, table) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, tables.items(), strict=False
    ):
        _panel(axes, model, table)
    return figure


def _panel(axes: Axes, model: str, table: list[_Row]) -> None:
    for place, row in enumerate(table):
        color = _FIRST if row.tier == 1 else _OTHERS
        ends = max(row.low, _FLOOR), max(row.high, _FLOOR)
        axes.plot(ends, (place, place), color=color, lw=2, alpha=0.4)
        axes.plot(max(row.loss, _FLOOR), place, "o", color=color, ms=5)
    best = min(table, key=lambda row: row.loss)
    axes.axvspan(_FLOOR, max(best.high, best.loss), color=_FIRST, alpha=0.08, lw=0)
    axes.set_yticks(range(len(table)), [row.name for row in table], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR, 5)
    axes.set_title(model.replace("_", "-"), loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("loss after 200 steps", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(read(Path(sys.argv[1]).read_text(encoding="utf-8"))).savefig(
        Path(__file__).with_name("ranking.png"), dpi=120
    )
