"""The report as one HTML page that needs nothing else: no server, no request."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report
from gradscope.errors import ConfigError
from gradscope.reporters.html.payload import payload
from gradscope.reporters.html.pictures import Picture, pictures
from gradscope.reporters.html.script import policy, script, stylesheet
from gradscope.reporters.html.sheets import Sheet, sheets
from gradscope.reporters.html.sketches import sketch
from gradscope.reporters.outline import Branch, outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.templates import template
from gradscope.reporters.wording import checked, has_verdict, skipped_by_reason, verdict

_MAX_CAUSES = 50
_MAX_CONSEQUENCES = 20
# More would be too narrow to read, and the page too large to open.
_MAX_RUNS = 8


@dataclass(frozen=True, slots=True)
class HtmlReporter:
    """One page that draws its pictures itself, and has static ones for print."""

    suffix: str = ".html"

    def render(self, report: Report) -> str:
        """The whole page."""
        return render_side_by_side([report])


def render_side_by_side(reports: Sequence[Report]) -> str:
    """One page with several runs beside one another. Raises ConfigError for more than eight."""
    if not 1 <= len(reports) <= _MAX_RUNS:
        message = f"{len(reports)} runs for one page; give 1 to {_MAX_RUNS}"
        raise ConfigError(message)
    names = _names(reports)
    runs = [_Column.of(report, name) for report, name in zip(reports, names, strict=True)]
    drawn = [
        payload(report, name, len(reports))
        for report, name in zip(reports, names, strict=True)
        if len(report.run.recorded_steps)
    ]
    title = str(reports[0].run.meta.get("model", "a run"))
    page: str = template("html/page.html").render(
        css=Markup(stylesheet()),  # noqa: S704  (files of this package)
        script=Markup(script()),  # noqa: S704
        policy=policy(),
        title=title if len(reports) == 1 else f"{len(reports)} runs",
        runs=runs,
        drawable=bool(drawn),
        has_depth=any(run["profile"] for run in drawn),
        counted={spread["title"] for run in drawn for spread in run["spreads"]},
        data=_embedded(drawn),
        max_consequences=_MAX_CONSEQUENCES,
        sketch=sketch,
    )
    return page


@dataclass(frozen=True, slots=True)
class _Column:
    """What the page says of one run."""

    name: str
    report: Report
    verdict: str
    state: str
    checked: str
    causes: Sequence[Branch]
    causes_left_out: int
    notes: Sequence[Finding]
    notes_left_out: int
    particulars: Mapping[str, str]
    unseen: Sequence[str]
    skipped: Mapping[str, Sequence[str]]
    sheets: Sequence[Sheet]
    pictures: Mapping[str, Picture] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report, name: str) -> "_Column":
        branches = outline(report)
        harmful = [branch for branch in branches if branch.harmful]
        notes = [finding for branch in branches if not branch.harmful for finding in branch]
        return cls(
            name=name,
            report=report,
            verdict=verdict(report),
            state=_state(report, harmful[0].severity if harmful else None),
            checked=checked(report),
            causes=harmful[:_MAX_CAUSES],
            causes_left_out=len(harmful[_MAX_CAUSES:]),
            notes=notes[:_MAX_CAUSES],
            notes_left_out=len(notes[_MAX_CAUSES:]),
            particulars=particulars(report.run),
            unseen=unseen(report.run),
            skipped=skipped_by_reason(report),
            sheets=sheets(report),
            pictures=pictures(report),
        )


def _names(reports: Sequence[Report]) -> list[str]:
    """Each run's folder; a number behind those that are called the same."""
    names: list[str] = []
    for report in reports:
        folder = PurePath(str(report.run.meta.get("log_dir") or "")).name
        name = folder or str(report.run.meta.get("model", "run"))
        number_of_it = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({number_of_it + 1})" if number_of_it else name)
    return names


def _state(report: Report, worst: Severity | None) -> str:
    if worst is not None:
        return worst.value
    return "healthy" if has_verdict(report) else "info"


def _embedded(data: Any) -> Markup:
    """JSON that can't end the element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704  (no markup is left in it)
