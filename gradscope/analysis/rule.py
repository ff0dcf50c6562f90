"""A rule: code, name, what it needs, its limits, a pure function, and its page."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from importlib import import_module
from typing import Any, Generic, TypeVar

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.errors import ConfigTypeError
from gradscope.record import Run

L = TypeVar("L")


class UnjudgedError(Exception):
    """A check raises this where the run lacks what it needs to judge; it says what that is."""


# The sections of a rule's page, in this order.
SECTIONS = (
    "What it measures",
    "Why it matters",
    "How sure it is",
    "Known limits",
    "Example",
    "References",
)


@dataclass(frozen=True, slots=True)
class Rule(Generic[L]):
    """One check of a run. `check` is pure: no I/O, no clock, no randomness, no torch.

    `requires` names the quantities without which it is skipped, as "table.quantity".
    `limits` is a frozen dataclass with a default, a reason and a source for each number.
    """

    code: str
    name: str
    requires: tuple[str, ...]
    limits: L
    check: Callable[[Run, L], Iterator[Finding]]

    @property
    def doc(self) -> str:
        """The page: the docstring of the check."""
        return inspect.getdoc(self.check) or ""

    def section(self, title: str) -> str:
        """The text of one section of the page, on one line per paragraph; "" without one."""
        found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", self.doc, re.MULTILINE | re.DOTALL)
        paragraphs = found.group(1).strip().split("\n\n") if found else []
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The decorator put the rule where pickle looks for the function.
        of, name = self.check.__module__, self.check.__qualname__
        known = getattr(sys.modules.get(of), name, None)
        if isinstance(known, Rule) and known.check is self.check:
            return _with_limits, (of, name, self.limits)
        return Rule, (self.code, self.name, self.requires, self.limits, self.check)

    def finding(
        self,
        severity: Severity,
        layer: str | None,
        message: str,
        *,
        evidence: tuple[Evidence, ...] = (),
        remedies: tuple[str, ...] = (),
    ) -> Finding:
        """A finding of this rule."""
        return Finding(self.code, self.name, severity, layer, message, evidence, remedies)


def _with_limits(module: str, name: str, limits: Any) -> Rule[Any]:
    """The rule that is called so, with these limits."""
    known: Rule[Any] = getattr(import_module(module), name)
    return replace(known, limits=limits)


def rule(
    code: str, *, name: str, limits: L, requires: tuple[str, ...] = ()
) -> Callable[[Callable[[Run, L], Iterator[Finding]]], Rule[L]]:
    """Make a rule of a function `(run, limits) -> Iterator[Finding]`."""
    given: Any = limits
    if not is_dataclass(given) or isinstance(given, type):
        message = f"the limits of {code} must be an instance of a frozen dataclass"
        raise ConfigTypeError(message)

    def decorate(check: Callable[[Run, L], Iterator[Finding]]) -> Rule[L]:
        return Rule(code, name, requires, limits, check)

    return decorate
