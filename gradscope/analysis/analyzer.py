"""analyze(): ask every rule, arrange what they say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradscope.analysis.causes import arrange
from gradscope.analysis.config import with_limits
from gradscope.analysis.finding import Finding
from gradscope.analysis.report import Report, Skipped
from gradscope.analysis.rule import Rule, UnjudgedError
from gradscope.analysis.rules import BUILTIN
from gradscope.record import Run, Table


def analyze(
    run: Run,
    rules: Sequence[Rule[Any]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> Report:
    """Ask the rules (default: all of gradscope's own) what is wrong with the run.

    `limits` overrides numbers of rules by code or name: `{"GS101": {"decay": 1e-4}}`. A rule that
    lacks a quantity, or fails, is in `Report.skipped` with the reason; nothing is raised for
    it. No file is read: the project's own choice is `rules=gradscope.configured_rules()`.
    Raises ConfigError for an unknown rule or limit.
    """
    asked = with_limits(tuple(BUILTIN if rules is None else rules), limits or {})
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
