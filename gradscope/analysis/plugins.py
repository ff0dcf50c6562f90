"""Rules that other packages bring along: the entry point group `gradscope.rules`."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from gradscope.analysis.finding import Finding
from gradscope.analysis.rule import Rule, UnjudgedError
from gradscope.analysis.rules import BUILTIN
from gradscope.errors import GradscopeWarning
from gradscope.record import Run

GROUP = "gradscope.rules"


def available() -> tuple[Rule[Any], ...]:
    """All rules: gradscope's own, then those of other packages.

    An entry point of the group is a rule or a sequence of rules. One that can't be loaded is
    warned of, and stands here as a rule that can't judge, so that every report says so.
    """
    rules = {rule.code: rule for rule in BUILTIN}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            brought = _loaded(point, rules)
        except Exception as error:  # noqa: BLE001  (a broken package must not cost the report)
            brought = [_stand_in(point, f"{type(error).__name__}: {error}")]
        rules |= {rule.code: rule for rule in brought}
    return tuple(rules.values())


def is_stand_in(rule: Rule[Any]) -> bool:
    """Whether it stands for rules that could not be loaded."""
    return isinstance(rule.limits, _Broken)


def _loaded(point: EntryPoint, known: dict[str, Rule[Any]]) -> list[Rule[Any]]:
    found = point.load()
    rules = list(found) if isinstance(found, Iterable) else [found]
    for rule in rules:
        if not isinstance(rule, Rule):
            message = f"{point.value} is of {type(rule).__name__}, not a gradscope.Rule"
            raise TypeError(message)
    codes = [rule.code for rule in rules]
    for code in codes:
        if code in known or codes.count(code) > 1:
            message = f"the code {code} is another rule's"
            raise ValueError(message)
    return rules


@dataclass(frozen=True, slots=True)
class _Broken:
    """Why an entry point gave no rules."""

    reason: str


def _stand_in(point: EntryPoint, reason: str) -> Rule[_Broken]:
    of = f" of {point.dist.name}" if point.dist is not None else ""
    words = f"the plugin {point.name}{of} can't be loaded: {reason}"
    # A filter that turns warnings into errors must not cost the report either.
    with suppress(GradscopeWarning):
        warnings.warn(f"gradscope: {words}", GradscopeWarning, stacklevel=3)
    return Rule(point.value, point.name, (), _Broken(words), _can_not_judge)


def _can_not_judge(run: Run, limits: _Broken) -> Iterator[Finding]:
    """A rule of another package that could not be loaded."""
    del run
    raise UnjudgedError(limits.reason)
