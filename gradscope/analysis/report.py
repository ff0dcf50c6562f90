"""The report: a run, what was found in it, and what could not be checked."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Skipped:
    """A rule that could not be checked, and why."""

    code: str
    name: str
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class Report:
    """What the rules say of a run.

    `findings` has root causes first, by severity, then what they explain. `skipped` are the
    rules that lacked something; `rules` are all that were asked.
    """

    run: Run
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    rules: tuple[Rule[Any], ...]

    @property
    def roots(self) -> tuple[Finding, ...]:
        """The findings that no other explains."""
        return tuple(finding for finding in self.findings if not finding.explained_by)

    @property
    def healthy(self) -> bool:
        """Whether there is neither a warning nor an error."""
        return all(finding.severity is Severity.INFO for finding in self.findings)

    def __repr__(self) -> str:
        # That of a dataclass would print every rule's limits.
        return f"Report({len(self.findings)} findings, {len(self.skipped)} rules skipped)"

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from gradscope import reporters  # noqa: PLC0415

        return reporters.report_html(self)

    def print(self) -> None:
        """Print it to the terminal."""
        from gradscope import reporters  # noqa: PLC0415  (see docs/decisions/0004)

        reporters.print_report(self)

    def write(self, path: str | PathLike[str]) -> None:
        """Write it to a file: .html, .md, .json or .txt.

        Raises ConfigError for another suffix, OSError where the file can't be written.
        """
        from gradscope import reporters  # noqa: PLC0415

        reporters.write_report(self, path)
