"""The findings as Markdown, for TensorBoard's text tab."""

from collections.abc import Iterable, Sequence

from gradscope.analysis.finding import Finding
from gradscope.analysis.report import Report
from gradscope.analysis.words import count
from gradscope.reporters.outline import Branch, outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.wording import (
    checked,
    inert,
    since,
    skipped_by_reason,
    title,
    verdict,
    why,
)

# The text tab shows one run after the other; a long text hides the next.
_MAX_CAUSES = 10
_MAX_CONSEQUENCES = 10


def findings_markdown(report: Report) -> str:
    """The findings for TensorBoard's text tab, root causes first."""
    branches = outline(report)
    harmful = [branch for branch in branches if branch.harmful]
    notes = [finding for branch in branches if not branch.harmful for finding in branch]
    blocks = [f"## {_escaped(verdict(report))}"]
    for branch in harmful[:_MAX_CAUSES]:
        blocks += _cause(report, branch)
    if len(harmful) > _MAX_CAUSES:
        blocks.append(f"And {count(len(harmful) - _MAX_CAUSES, 'more root cause')}.")
    if notes:
        blocks += ["### Also seen, without harm", _points(_cut(notes))]
    facts = [f"Checked: {checked(report)}"]
    facts += [
        f"Skipped: {', '.join(rules)} ({reason})"
        for reason, rules in skipped_by_reason(report).items()
    ]
    facts += [f"Not seen: {gap}" for gap in unseen(report.run)]
    facts += [f"{label}: {fact}" for label, fact in particulars(report.run).items()]
    blocks += ["### How it was measured", _points(map(_escaped, facts))]
    return "\n\n".join(blocks) + "\n"


def _cause(report: Report, branch: Branch) -> list[str]:
    finding = branch.finding
    heading = f"{finding.severity.value.upper()}: {title(finding)}"
    blocks = [f"### {_escaped(heading)}", _escaped(finding.message)]
    when, reason = since(finding, report.run), why(report, finding)
    if when:
        blocks.append(f"**Seen** {_escaped(when)}.")
    if reason:
        blocks.append(f"**Why it matters:** {_escaped(reason)}")
    if finding.remedies:
        numbered = enumerate(map(_escaped, finding.remedies), start=1)
        blocks += ["**What to do**", "\n".join(f"{place}. {text}" for place, text in numbered)]
    explained = [other for other in branch if other is not finding]
    if explained:
        blocks += ["**This explains**", _points(_cut(explained))]
    return blocks


def _point(finding: Finding) -> str:
    heading = f"{finding.severity.value}: {title(finding)}"
    return f"**{_escaped(heading)}** {_escaped(finding.message)}"


def _cut(findings: Sequence[Finding]) -> list[str]:
    """A line for each of the first, and how many more there are."""
    shown = [_point(finding) for finding in findings[:_MAX_CONSEQUENCES]]
    more = len(findings) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def _points(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MARKUP = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]#!|"} | _HTML)


def _escaped(text: str) -> str:
    """The text without meaning to Markdown and HTML: names can hold anything."""
    return inert(text).translate(_MARKUP)
