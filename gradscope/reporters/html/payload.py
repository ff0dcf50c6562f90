"""What the page's pictures are drawn from: plain values and packed arrays."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradscope.analysis.finding import Finding
from gradscope.analysis.layers import ROOT, module_of, part_of
from gradscope.analysis.report import Report
from gradscope.analysis.robust import median
from gradscope.record import Table
from gradscope.reporters.html.charts import charts
from gradscope.reporters.html.grids import heatmaps, profile
from gradscope.reporters.html.ridges import spreads
from gradscope.reporters.wording import inert

# The page stays below 3 MB: a number takes about two bytes in it.
_MAX_NUMBERS = 700_000


def payload(report: Report, name: str, share: int = 1) -> dict[str, Any]:
    """Everything that is drawn of one run; `share`: how many runs share the page."""
    run = report.run
    return {
        "name": inert(name),
        "heatmaps": list(heatmaps(report, _MAX_NUMBERS // share)),
        "profile": profile(report, _MAX_NUMBERS // share // 8),
        "charts": list(charts(report)) if len(run.steps) else [],
        "spreads": spreads(report),
        "layers": _layers(report),
    }


def _layers(report: Report) -> list[dict[str, Any]]:
    """The parts of the model with their health, for the tree; the model itself comes first."""
    run = report.run
    table, quantity = run.modules, "output_grad_norm"
    if not table.entities:
        table, quantity = run.parameters, "grad_norm"
    medians = zip(table.entities, _medians(table, quantity), strict=True)
    # Further uses of a module are the same part of the model.
    listed = [(entity, norm) for entity, norm in medians if part_of(entity.name) == entity.name]
    listed.sort(key=lambda part: (part[0].name != ROOT, part[0].depth))
    found = _by_layer(report)
    made = [
        {
            "name": inert(entity.name),
            "type": inert(entity.type),
            "value": norm if math.isfinite(norm) else None,
            **_health(found.pop(entity.name, ())),
        }
        for entity, norm in listed
    ]
    # A module that holds others, and is not watched itself, can hold a parameter with a finding.
    rest = [
        {"name": inert(name), "type": "", "value": None, **_health(found[name])} for name in found
    ]
    return made + rest


def _medians(table: Table, quantity: str) -> list[float]:
    if not len(table.steps):
        return [math.nan] * len(table.entities)
    values = table[quantity].astype(np.float64)
    return list(map(float, median(np.where(np.isfinite(values), values, np.nan), axis=0)))


def _by_layer(report: Report) -> dict[str, list[Finding]]:
    """The findings at each part of the model: at one of its uses, or at a parameter of it."""
    run = report.run
    parameters = set(run.parameters.names) if run.modules.entities else set()
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.layer is not None:
            name = finding.layer
            part = module_of(name) if name in parameters else part_of(name)
            found.setdefault(part, []).append(finding)
    return found


def _health(found: Sequence[Finding]) -> dict[str, Any]:
    """The worst of a part's findings."""
    if not found:
        return {"severity": "healthy", "codes": []}
    worst = max(finding.severity for finding in found)
    return {"severity": worst.value, "codes": sorted({finding.code for finding in found})}
