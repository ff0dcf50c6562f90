"""The report as Markdown, for issues and pull requests; TensorBoard's text tab is a variant."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.report import Report
from gradscope.analysis.words import count, layer_in_words, number
from gradscope.reporters.outline import Branch, outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.wording import (
    checked,
    how_sure,
    inert,
    since,
    skipped_by_reason,
    steps,
    verdict,
    why,
)

_MAX_CONSEQUENCES = 10
_MAX_NOTES = 10

_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "~": "&#126;"}
_MARKUP = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]|!"} | _HTML)
# What GitHub makes links of, and people are called by; a comment in it breaks the spell.
_LINKS = re.compile(r"@|#|:(?=//)|www(?=\.)|GH(?=-\d)")
# What makes a list or a rule of a line that begins with it.
_LINE_START = re.compile(r"^(\s*\d*)([-+.)])")


@dataclass(frozen=True, slots=True)
class MarkdownReporter:
    """Markdown as GitHub reads it. At most `limit` root findings are shown, the worst first.

    `folded` hides details until they are clicked at; where there is no HTML (TensorBoard) they
    are shown, and without evidence.
    """

    suffix: str = ".md"
    limit: int = 10
    folded: bool = True

    def render(self, report: Report) -> str:
        """The whole document."""
        return "\n\n".join(self._blocks(report)) + "\n"

    def _blocks(self, report: Report) -> Iterator[str]:
        branches = outline(report)
        harmful = [branch for branch in branches if branch.harmful]
        notes = [finding for branch in branches if not branch.harmful for finding in branch]
        yield f"## {escaped(verdict(report))}"
        for branch in harmful[: self.limit]:
            yield from self._cause(report, branch)
        if len(harmful) > self.limit:
            yield f"And {count(len(harmful) - self.limit, 'more root cause')}."
        if notes:
            yield from self._details("Also seen, without harm", [points(_cut(notes, _MAX_NOTES))])
        facts = points(map(escaped, _facts(report)))
        yield from self._details("How it was measured", [facts])

    def _cause(self, report: Report, branch: Branch) -> Iterator[str]:
        finding = branch.finding
        yield f"### {finding.severity.value.upper()}: {_title(finding)}"
        when = since(finding, report.run)
        yield prose(finding.message) + (f" Seen {when}." if when else "")
        if finding.remedies:
            yield "**What to do**"
            numbered = enumerate(map(prose, finding.remedies), start=1)
            yield "\n".join(f"{place}. {text}" for place, text in numbered)
        explained = [other for other in branch if other is not finding]
        if explained:
            yield "**This explains**"
            yield points(_cut(explained, _MAX_CONSEQUENCES))
        reason = why(report, finding)
        details = [f"**Why it matters:** {prose(reason)}"] if reason else []
        sure = how_sure(report, finding)
        if sure:
            details.append(f"**How sure it is:** {prose(sure)}")
        if self.folded and finding.evidence:
            details.append(_evidence(finding.evidence))
        if details and self.folded:
            yield from self._details("Evidence, and why it matters", details)
        else:
            yield from details

    def _details(self, summary: str, blocks: Iterable[str]) -> Iterator[str]:
        if self.folded:
            yield f"<details><summary>{summary}</summary>"
            yield from blocks
            yield "</details>"
        else:
            yield f"### {summary}"
            yield from blocks


def _facts(report: Report) -> Iterator[str]:
    yield f"Checked: {checked(report)}"
    for reason, rules in skipped_by_reason(report).items():
        yield f"Skipped: {', '.join(rules)} ({reason})"
    for gap in unseen(report.run):
        yield f"Not seen: {gap}"
    for label, fact in particulars(report.run).items():
        yield f"{label}: {fact}"


def _evidence(evidence: Sequence[Evidence]) -> str:
    rows = [
        [
            escaped(each.quantity),
            code(each.entity) if each.entity else "",
            number(each.observed),
            "" if each.limit is None else number(each.limit),
            steps(each.first_step, each.last_step),
        ]
        for each in evidence
    ]
    return grid(["quantity", "of", "observed", "limit", "steps"], rows)


def _title(finding: Finding) -> str:
    where = f" at {code(layer_in_words(finding.layer))}" if finding.layer else ""
    return f"{finding.code} {escaped(finding.name)}{where}"


def _cut(findings: Sequence[Finding], most: int) -> list[str]:
    """A line for each of the first, and how many more there are."""
    shown = [
        f"**{finding.severity.value}: {_title(finding)}** {prose(finding.message)}"
        for finding in findings[:most]
    ]
    more = len(findings) - len(shown)
    return [*shown, f"and {more:,} more"] if more else shown


def points(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """The text without meaning to Markdown and HTML, and calling nobody: names hold anything."""
    quiet = _LINKS.sub(lambda found: f"{found[0]}\0", inert(text)).translate(_MARKUP)
    return _LINE_START.sub(r"\1\\\2", quiet).replace("\0", "<!-- -->")


def prose(text: str) -> str:
    """A sentence in which what stands between backticks is code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escaped(text)
    return "".join(code(part) if index % 2 else escaped(part) for index, part in enumerate(parts))


def code(text: str) -> str:
    """A name as code, in which nothing has a meaning, also in a table."""
    shown = inert(text)
    if shown.strip() == shown != "" and not set(shown) & set("`|\\"):
        return f"`{shown}`"
    entities = (char if char.isalnum() else f"&#{ord(char)};" for char in shown)
    return f"<code>{''.join(entities)}</code>"
