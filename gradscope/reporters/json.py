"""The report as JSON, in the shape that report.schema.json describes."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradscope.analysis.coverage import Coverage, coverage
from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.report import Report
from gradscope.analysis.rule import Rule
from gradscope.record import Run, StepArray
from gradscope.reporters.provenance import unseen
from gradscope.reporters.wording import verdict

# 1: the first. A new field keeps the number, a changed or dropped one raises it.
SCHEMA_VERSION = 1

_RUN_FACTS = (
    "model",
    "parameters",
    "trainable_parameters",
    "device",
    "criterion",
    "cadence",
    "level",
    "loss_is_progress",
    "created",
    "versions",
    "log_dir",
    "format_version",
)


@dataclass(frozen=True, slots=True)
class JsonReporter:
    """JSON, ASCII only."""

    suffix: str = ".json"

    def render(self, report: Report) -> str:
        """The whole document."""
        return json.dumps(to_json(report), allow_nan=False, indent=2) + "\n"


def to_json(report: Report) -> dict[str, Any]:
    """The report as a document of plain values.

    Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity".
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(report),
        "healthy": report.healthy,
        "findings": [_finding(finding) for finding in report.findings],
        "skipped": [asdict(skipped) for skipped in report.skipped],
        "rules": [_rule(rule) for rule in report.rules],
        "run": _run(report.run),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity.value,
        "layer": finding.layer,
        "message": finding.message,
        "evidence": [_evidence(evidence) for evidence in finding.evidence],
        "remedies": list(finding.remedies),
        "explained_by": list(finding.explained_by),
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "quantity": evidence.quantity,
        "entity": evidence.entity,
        "first_step": int(evidence.first_step),
        "last_step": int(evidence.last_step),
        "observed": _plain(evidence.observed),
        "limit": _plain(evidence.limit),
    }


def _rule(rule: Rule[Any]) -> dict[str, Any]:
    return {
        "code": rule.code,
        "name": rule.name,
        "requires": list(rule.requires),
        "how_sure": rule.section("How sure it is"),
        "limits": _plain(asdict(rule.limits)),
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        **{fact: _plain(run.meta.get(fact)) for fact in _RUN_FACTS},
        "steps_seen": _steps(run.steps),
        "steps_recorded": _steps(run.recorded_steps),
        "coverage": _plain(run.meta.get("coverage", {})),
        "seen": _seen(coverage(run)),
        "unseen": unseen(run),
    }


def _seen(found: Coverage | None) -> dict[str, Any] | None:
    if found is None:
        return None
    kinds = {"parameters": found.parameters, "modules": found.modules}
    return {
        "step": found.step,
        "always": found.always,
        **{
            name: {"expected": kind.expected, "seen": kind.amount, "unseen": dict(kind.unseen)}
            for name, kind in kinds.items()
        },
    }


def _steps(steps: StepArray) -> dict[str, int | None]:
    known = len(steps) > 0
    return {
        "count": len(steps),
        "first": int(steps[0]) if known else None,
        "last": int(steps[-1]) if known else None,
    }


def _plain(value: Any) -> Any:
    """The value in JSON's types; numpy's scalars know how to become Python's."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value)
