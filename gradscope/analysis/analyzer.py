"""analyze(): ask every rule, arrange what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from gradscope.analysis.causes import arrange
from gradscope.analysis.finding import Finding
from gradscope.analysis.report import Report, Skipped
from gradscope.analysis.rule import Rule, UnjudgedError
from gradscope.analysis.rules import BUILTIN
from gradscope.errors import ConfigError
from gradscope.record import Run, Table


def analyze(
    run: Run,
    rules: Sequence[Rule[Any]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> Report:
    """Ask the rules (default: all of gradscope's own) what is wrong with the run.

    `limits` overrides numbers of rules by code: `{"GS101": {"decay": 1e-4}}`. A rule that
    lacks a quantity, or fails, is in `Report.skipped` with the reason; nothing is raised for
    it. Raises ConfigError for an unknown code or limit.
    """
    asked = _with_limits(tuple(BUILTIN if rules is None else rules), limits or {})
    found: list[Finding] = []
    skipped: list[Skipped] = []
    for rule in asked:
        missing = [name for name in rule.requires if not _measured(run, name)]
        if missing:
            reason = f"not measured: {', '.join(missing)}"
            skipped.append(Skipped(rule.code, rule.name, reason))
            continue
        try:
            found += list(rule.check(run, rule.limits))
        except UnjudgedError as lack:
            skipped.append(Skipped(rule.code, rule.name, str(lack)))
        except Exception as error:  # noqa: BLE001  (one bad rule must not cost the report)
            reason = f"failed: {type(error).__name__}: {error}"
            skipped.append(Skipped(rule.code, rule.name, reason))
    return Report(run, arrange(found), tuple(skipped), asked)


def _measured(run: Run, name: str) -> bool:
    table_name, _, quantity = name.partition(".")
    table: Table = getattr(run, table_name)
    return quantity in table.quantities and not np.isnan(table[quantity]).all()


def _with_limits(
    rules: tuple[Rule[Any], ...], limits: Mapping[str, Mapping[str, float]]
) -> tuple[Rule[Any], ...]:
    by_code = {rule.code: rule for rule in rules}
    for code, overrides in limits.items():
        if code not in by_code:
            message = f"limits for an unknown rule {code!r}{_near(code, list(by_code))}"
            raise ConfigError(message)
        known = [field.name for field in fields(by_code[code].limits)]
        for name in overrides:
            if name not in known:
                message = f"{code} has no limit {name!r}{_near(name, known)}"
                raise ConfigError(message)
        changed = replace(by_code[code].limits, **overrides)
        by_code[code] = replace(by_code[code], limits=changed)
    return tuple(by_code[rule.code] for rule in rules)


def _near(wrong: str, known: list[str]) -> str:
    match = get_close_matches(wrong, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; there are: {', '.join(known)}"
