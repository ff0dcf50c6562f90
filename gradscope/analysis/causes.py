"""Cause before consequence: one table of what explains what."""

from collections.abc import Iterable
from dataclasses import replace

from gradscope.analysis.finding import Finding

# cause → what it explains, directly or through one of the others.
EXPLAINS: dict[str, tuple[str, ...]] = {
    # What never reaches the optimizer, or never gets a gradient, can't vanish on the way.
    "GS004": ("GS002",),
    # A scale of the weights that each layer multiplies the signal with.
    "GS104": ("GS101", "GS102", "GS003", "GS503"),
    # A gradient that has grown beyond the range of the dtype.
    "GS102": ("GS503",),
    # A gradient that has shrunk below it.
    "GS101": ("GS003",),
    # After the first NaN nothing else means anything.
    "GS503": ("GS003",),
}


def arrange(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Root causes first, by severity; then what they explain, with `explained_by` set."""
    found = list(findings)
    present = {finding.code for finding in found}
    arranged = []
    for finding in found:
        # In the table's order: the nearest cause last to be said would hide the root.
        causes = tuple(
            code
            for code, consequences in EXPLAINS.items()
            if code in present and finding.code in consequences and code != finding.code
        )
        arranged.append(replace(finding, explained_by=causes))
    return tuple(
        sorted(
            arranged,
            key=lambda finding: (
                bool(finding.explained_by),
                -_rank(finding),
                finding.code,
                finding.layer or "",
            ),
        )
    )


def _rank(finding: Finding) -> int:
    return list(type(finding.severity)).index(finding.severity)
