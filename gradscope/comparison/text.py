"""A comparison as text, for terminals and files."""

import io
import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradscope.analysis.words import number
from gradscope.comparison.result import Comparison, Configuration
from gradscope.comparison.table import per_layer
from gradscope.comparison.wording import disagreements, recommendation, size, verdict

_MOST = 30
_FEW = 4
_WIDTH = 100


def print_comparison(comparison: Comparison) -> None:
    """Print verdict, table and recommendation, in colour where the terminal shows it."""
    console = Console(highlight=False)
    width = min(console.width, _WIDTH)
    with console.capture() as captured:
        _tell(comparison, console, width)
    # A terminal or a pipe may know fewer characters than χ.
    known = captured.get().encode(console.encoding, "replace").decode(console.encoding)
    console.file.write(known)


def as_text(comparison: Comparison, width: int = _WIDTH) -> str:
    """The same without colour."""
    file = io.StringIO()
    _tell(comparison, Console(file=file, width=width, color_system=None), width)
    return file.getvalue()


def _tell(comparison: Comparison, console: Console, width: int) -> None:
    console.print(Text(verdict(comparison), "bold"), width=width)
    console.print(Text(size(comparison), "dim"), width=width)
    if not comparison.complete:
        missing = f"{comparison.missing} measurements are missing: this is a part of the comparison"
        console.print(Text(missing, "bold yellow"), width=width)
    console.print()
    console.print(_table(comparison), width=width)
    over = len(comparison.configurations) - _MOST
    if over > 0:
        console.print(Text(f"and {over} more: .frame() has them all", "dim"))
    console.print()
    console.print(Text(recommendation(comparison), "bold"), width=width)
    tried = comparison.verification
    if comparison.best.snippet and (tried is None or tried.better):
        console.print()
        console.print(Text(comparison.best.snippet.rstrip()), soft_wrap=True)
    _lists(comparison, console, width)


def _table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tier", justify="right")
    table.add_column("configuration", overflow="fold")
    for heading in ("decades", "per layer", "theory"):
        table.add_column(heading, justify="right")
    timed = any(not math.isnan(c.mean("time_decades")) for c in comparison.configurations)
    trained = any(not math.isnan(c.mean("trained")) for c in comparison.configurations)
    if timed:
        table.add_column("over time", justify="right")
    if trained:
        table.add_column("first steps", justify="right")
        table.add_column("loss after", justify="right")
    shown = comparison.configurations[:_MOST]
    for before, c in zip((None, *shown), shown, strict=False):
        first = before is None or before.tier != c.tier
        cells = [
            f"{c.mean('decades'):+.2f}" if _is(c.mean("decades")) else "–",
            number(per_layer(c.growth.mean)) if _is(c.growth.mean) else "–",
            number(per_layer(c.theory)) if _is(c.theory) else "–",
        ]
        if timed:
            cells.append(f"{c.mean('time_decades'):+.2f}" if _is(c.mean("time_decades")) else "–")
        if trained:
            cells += [number(c.mean(of)) if _is(c.mean(of)) else "–" for of in ("early", "trained")]
        table.add_row(str(c.tier) if first else "", Text(_named(c)), *cells, style=_style(c))
    return table


def _is(value: float) -> bool:
    return not math.isnan(value)


def _named(c: Configuration) -> str:
    return f"× {c.name}" if c.failure else str(c.name)


def _style(c: Configuration) -> str:
    if c.failure:
        return "red"
    return "green" if c.tier == 1 else ""


def _lists(comparison: Comparison, console: Console, width: int) -> None:
    lists = {
        "Can't train": [f"{c.name}: {c.failure}" for c in comparison.configurations if c.failure],
        "Where theory and measurement differ": disagreements(comparison),
        "Not compared": [f"{name}: {why}" for name, why in comparison.left_out.items()],
        "Left as it was": [f"{name}: {why}" for name, why in comparison.left.items()],
        "Notes": list(comparison.notes),
    }
    for heading, lines in lists.items():
        if lines:
            console.print()
            console.print(Text(heading, "dim"))
            for line in lines[:_FEW]:
                console.print(Text(f"- {line}"), width=width)
            if len(lines) > _FEW:
                console.print(Text(f"  and {len(lines) - _FEW} more", "dim"))
