"""Which finding stands under which: every finding once, root causes on top."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report


@dataclass(frozen=True, slots=True)
class Branch:
    """A finding and what it explains."""

    finding: Finding
    explains: tuple["Branch", ...] = ()

    @property
    def severity(self) -> Severity:
        """The worst in the branch: a mild cause may have bad consequences."""
        return max(finding.severity for finding in self)

    @property
    def harmful(self) -> bool:
        """Whether there is a warning or an error in the branch."""
        return self.severity is not Severity.INFO

    def __iter__(self) -> Iterator[Finding]:
        yield self.finding
        for branch in self.explains:
            yield from branch


def outline(report: Report) -> tuple[Branch, ...]:
    """The findings as trees, the worst tree first."""
    findings = report.findings
    by_code: dict[str, list[int]] = defaultdict(list)
    for index, finding in enumerate(findings):
        by_code[finding.code].append(index)

    roots: list[int] = []
    under: dict[int, list[int]] = defaultdict(list)
    for index, finding in enumerate(findings):
        cause = _cause(finding, findings, by_code)
        if cause is None:
            roots.append(index)
        else:
            under[cause].append(index)

    placed: set[int] = set()

    def branch(index: int) -> Branch:
        placed.add(index)
        return Branch(
            findings[index],
            tuple(branch(other) for other in under[index] if other not in placed),
        )

    branches = [branch(index) for index in roots]
    # Findings that explain one another in a circle have no root, and must not get lost.
    branches.extend(branch(index) for index in range(len(findings)) if index not in placed)
    return tuple(sorted(branches, key=lambda tree: tree.severity, reverse=True))


def _cause(
    finding: Finding, findings: tuple[Finding, ...], by_code: dict[str, list[int]]
) -> int | None:
    """The finding that explains this one: preferably at the same layer, else the first."""
    causes = by_code.get(finding.explained_by[0], []) if finding.explained_by else []
    at_layer = (index for index in causes if findings[index].layer == finding.layer)
    return next(at_layer, causes[0] if causes else None)
