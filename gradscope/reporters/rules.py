"""The rules in the terminal: all of them in a table, one of them with its page."""

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradscope.analysis.pages import Limit, limits, sections, summary
from gradscope.analysis.rule import Rule
from gradscope.analysis.words import number

# Longer lines are hard to read.
_MAX_WIDTH = 100


def print_rules(rules: Sequence[Rule[Any]], asked: Collection[str]) -> None:
    """Print code, name and meaning of each; those that the project does not ask for say so."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("code", "name", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for rule in rules:
        left_out = Text("" if rule.code in asked else " (not asked here)", style="dim")
        meaning = Text(summary(rule)) + left_out
        table.add_row(Text(rule.code, style="bold"), Text(rule.name), meaning)
    _print([table])


def rules_json(rules: Sequence[Rule[Any]], asked: Collection[str]) -> str:
    """The same for machines, with each rule's limits."""
    listed = [
        {
            "code": rule.code,
            "name": rule.name,
            "summary": summary(rule),
            "asked": rule.code in asked,
            "limits": {limit.name: limit.value for limit in limits(rule)},
        }
        for rule in rules
    ]
    return json.dumps(listed, ensure_ascii=False, indent=2)


def print_rule(rule: Rule[Any]) -> None:
    """Print the rule's page: its docstring's sections, its limits and their reasons."""
    _print(_page(rule))


def _page(rule: Rule[Any]) -> Iterator[RenderableType]:
    yield Text(f"{rule.code} {rule.name}", style="bold")
    yield Markdown(summary(rule))
    for title, text in sections(rule).items():
        yield from _section(title, Markdown(text))
        # What is measured, and then by which numbers it is judged.
        if title == "What it measures" and (known := limits(rule)):
            yield from _section("Limits", *chain.from_iterable(map(_limit, known)))


def _section(title: str, *content: RenderableType) -> Iterator[RenderableType]:
    yield Text(f"\n{title}", style="bold cyan")
    yield from (Padding(part, (0, 0, 0, 2)) for part in content)


def _limit(limit: Limit) -> Iterator[RenderableType]:
    value = _shown(limit.value)
    text = Text(limit.name, style="bold") + Text(f" = {value}", style="not bold")
    if limit.value != limit.default:
        text += Text(f" (changed from {_shown(limit.default)})", style="yellow")
    yield text
    if limit.reason:
        yield Padding(Text(limit.reason, style="dim"), (0, 0, 0, 2))


def _shown(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return str(value)


def _print(parts: Iterator[RenderableType] | Sequence[RenderableType]) -> None:
    console = Console(highlight=False)
    width = min(console.width, _MAX_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part, width=width)
    # A terminal or a pipe may know fewer characters than these.
    known = captured.get().encode(console.encoding, "replace").decode(console.encoding)
    lines = [line.rstrip() for line in known.splitlines()]
    print("\n".join(lines))  # noqa: T201
