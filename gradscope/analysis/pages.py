"""A rule's page: what its docstring, its limits and the comments beside these say."""

import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gradscope.analysis.rule import SECTIONS, Rule


@dataclass(frozen=True, slots=True)
class Limit:
    """A number that a rule judges by, and why it is that; "" where the source can't be read."""

    name: str
    value: object
    default: object
    reason: str


def summary(rule: Rule[Any]) -> str:
    """The first sentence of the page, on one line."""
    return " ".join(rule.doc.partition("\n\n")[0].split())


def sections(rule: Rule[Any]) -> dict[str, str]:
    """Title → text, of those that there are."""
    known = {title: rule.section(title) for title in SECTIONS}
    return {title: text for title, text in known.items() if text}


def limits(rule: Rule[Any]) -> list[Limit]:
    """The rule's limits in their order."""
    kind = type(rule.limits)
    reasons = _comments(kind)
    return [
        Limit(
            field.name, getattr(rule.limits, field.name), field.default, reasons.get(field.name, "")
        )
        for field in fields(rule.limits)
    ]


def _comments(kind: type) -> Mapping[str, str]:
    """Field → the comment above it, or behind it."""
    try:
        lines = inspect.getsource(kind)
        tokens = list(tokenize.generate_tokens(io.StringIO(textwrap.dedent(lines)).readline))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        # Made at run time, or installed without its source.
        return {}
    found: dict[str, str] = {}
    above: list[str] = []
    field = ""
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("#").strip()
            if field:
                found[field] = f"{found.get(field, '')} {words}".strip()
            else:
                above.append(words)
        elif token.type == tokenize.NEWLINE:
            above, field = [], ""
        elif token.string == ":" and not field and before is not None and _begins_line(before):
            field = before.string
            found[field] = " ".join(above)
    return found


def _begins_line(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.NAME and not token.line[: token.start[1]].strip()
