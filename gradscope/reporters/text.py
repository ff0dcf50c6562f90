"""The report as text, for terminals and files."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.report import Report
from gradscope.analysis.words import count, number
from gradscope.reporters.outline import Branch, outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.wording import (
    checked,
    has_verdict,
    how_sure,
    inert,
    since,
    skipped_by_reason,
    title,
    verdict,
    why,
)

_MARKS = {Severity.ERROR: "×", Severity.WARNING: "!", Severity.INFO: "·"}
_STYLES = {
    Severity.ERROR: "bold red",
    Severity.WARNING: "bold yellow",
    Severity.INFO: "bold cyan",
}
_HEALTHY_STYLE = "bold green"

# Longer lines are hard to read.
_MAX_WIDTH = 100
_MAX_CONSEQUENCES = 5
_MAX_EVIDENCE = 4


@dataclass(frozen=True, slots=True)
class TextReporter:
    """Plain text. At most `limit` root findings are shown, the worst first."""

    suffix: str = ".txt"
    width: int = 80
    limit: int = 10

    def render(self, report: Report) -> str:
        """The whole text, without colour."""
        console = Console(file=io.StringIO(), width=self.width, color_system=None)
        lines = _laid_out(_paragraphs(report, self.limit), console, self.width)
        return lines.plain + "\n"


def print_text(report: Report) -> None:
    """Print the text, in colour where the terminal shows it."""
    console = Console(highlight=False)
    width = min(console.width, _MAX_WIDTH)
    lines = _laid_out(_paragraphs(report, TextReporter().limit), console, width)
    # A terminal or a pipe may know fewer characters than a layer's name.
    lines.plain = lines.plain.encode(console.encoding, "replace").decode(console.encoding)
    console.print(lines, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Paragraph:
    """Text with something before its first line, and as many blanks before the others."""

    text: Text
    lead: str = ""


def _laid_out(paragraphs: Iterator[_Paragraph], console: Console, width: int) -> Text:
    lines: list[Text] = []
    for paragraph in paragraphs:
        lead = paragraph.lead
        for line in paragraph.text.wrap(console, max(width - len(lead), 20)) or [Text()]:
            line.rstrip()
            placed = Text(lead) + line
            placed.rstrip()
            lines.append(placed)
            lead = " " * len(lead)
    return Text("\n").join(lines)


def _paragraphs(report: Report, limit: int) -> Iterator[_Paragraph]:
    branches = outline(report)
    harmful = [branch for branch in branches if branch.harmful]
    notes = [finding for branch in branches if not branch.harmful for finding in branch]
    style = _STYLES[harmful[0].severity] if harmful else _HEALTHY_STYLE
    yield _said(verdict(report), style=style if has_verdict(report) else "bold")
    for branch in harmful[:limit]:
        yield _said()
        yield from _cause(report, branch)
    if len(harmful) > limit:
        yield _said()
        yield _said(f"And {count(len(harmful) - limit, 'more root cause')}.")
    if notes:
        yield _said()
        yield _said("Also seen, without harm:", style="bold")
        for finding in notes[:limit]:
            yield _said(f"{title(finding)}: {inert(finding.message)}", "  · ")
        if len(notes) > limit:
            yield _said(f"and {len(notes) - limit} more", "    ")
    yield _said()
    yield from _provenance(report)


def _cause(report: Report, branch: Branch) -> Iterator[_Paragraph]:
    finding = branch.finding
    yield _headline(finding, "")
    yield _said(inert(finding.message), "  ")
    when = since(finding, report.run)
    if when:
        yield _said(f"Seen {when}.", "  ")
    for evidence in finding.evidence[:_MAX_EVIDENCE]:
        yield _said(_observation(evidence), "  - ", style="dim")
    reason = why(report, finding)
    if reason:
        yield _said(f"Why it matters: {inert(reason)}", "  ")
    sure = how_sure(report, finding)
    if sure:
        yield _said(f"How sure it is: {inert(sure)}", "  ")
    if finding.remedies:
        yield _said("What to do:", "  ", style="bold")
    for place, remedy in enumerate(finding.remedies, start=1):
        yield _said(inert(remedy), f"  {place}. ")
    if branch.explains:
        yield _said("This explains:", "  ", style="bold")
        yield from _consequences(branch, "    ")


def _observation(evidence: Evidence) -> str:
    of = f" of {inert(evidence.entity)}" if evidence.entity else ""
    limit = "" if evidence.limit is None else f" (limit {number(evidence.limit)})"
    at = f"steps {evidence.first_step} to {evidence.last_step}"
    if evidence.first_step == evidence.last_step:
        at = f"step {evidence.first_step}"
    return f"{inert(evidence.quantity)}{of}: {number(evidence.observed)}{limit}, {at}"


def _consequences(branch: Branch, indent: str) -> Iterator[_Paragraph]:
    for other in branch.explains[:_MAX_CONSEQUENCES]:
        yield _headline(other.finding, indent)
        yield _said(inert(other.finding.message), indent + "  ")
        yield from _consequences(other, indent + "  ")
    if len(branch.explains) > _MAX_CONSEQUENCES:
        yield _said(f"and {len(branch.explains) - _MAX_CONSEQUENCES} more", indent)


def _headline(finding: Finding, indent: str) -> _Paragraph:
    style = _STYLES[finding.severity]
    mark = f"{_MARKS[finding.severity]} {finding.severity.value.upper()}"
    text = Text(mark, style=style) + Text(f"  {title(finding)}", style="bold")
    return _Paragraph(text, indent)


def _provenance(report: Report) -> Iterator[_Paragraph]:
    facts = [("Checked", checked(report))]
    facts += [
        ("Skipped", f"{', '.join(rules)} ({reason})")
        for reason, rules in skipped_by_reason(report).items()
    ]
    facts += [("Not seen", gap) for gap in unseen(report.run)]
    facts += particulars(report.run).items()
    width = max(len(label) for label, _ in facts) + 2
    for label, fact in facts:
        yield _said(inert(fact), f"{label}:".ljust(width))


def _said(text: str = "", lead: str = "", style: str = "") -> _Paragraph:
    return _Paragraph(Text(text, style=style), lead)
