"""Cause before consequence: one table of what explains what."""

from collections.abc import Iterable
from dataclasses import replace

from gradscope.analysis.finding import Finding, Severity

# cause → what it can explain, directly or through another of these.
EXPLAINS: dict[str, tuple[str, ...]] = {
    # The optimizer steps on what the model has no more: what it has instead is in none.
    "GS008": ("GS001", "GS004"),
    # A scale of the weights that each layer multiplies the signal with.
    "GS104": (
        "GS101",
        "GS102",
        "GS003",
        "GS301",
        "GS302",
        "GS401",
        "GS402",
        "GS501",
        "GS503",
    ),
    # A step as large as the weights leaves them where nothing was tuned to be.
    "GS401": ("GS301", "GS302", "GS101", "GS102", "GS003", "GS501", "GS503"),
    # A gradient that has grown beyond what a step, or the range of the dtype, can take.
    "GS102": ("GS401", "GS301", "GS302", "GS501", "GS503"),
    # No slope, no gradient for what comes before.
    "GS301": ("GS003",),
    "GS302": ("GS101", "GS003", "GS402"),
    # A gradient that has shrunk below what the dtype, or a step, can show.
    "GS101": ("GS003", "GS402"),
    # A loss without a value has no gradient; the first of the two to break is the cause.
    "GS501": ("GS003", "GS503"),
    # A NaN in the gradient is in the weights a step later, then in the loss.
    "GS503": ("GS003", "GS501"),
}


def arrange(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Root causes first, by severity; then what they explain, with `explained_by` set."""
    found = list(findings)
    arranged = [replace(finding, explained_by=tuple(_causes(finding, found))) for finding in found]
    return tuple(
        sorted(
            arranged,
            key=lambda finding: (
                bool(finding.explained_by),
                -list(Severity).index(finding.severity),
                finding.code,
                finding.layer or "",
            ),
        )
    )


def _causes(finding: Finding, found: list[Finding]) -> Iterable[str]:
    """The codes of what explains it; in the table's order: roots before what they cause."""
    for code, consequences in EXPLAINS.items():
        if finding.code in consequences and any(
            cause.code == code and _can_explain(cause, finding) for cause in found
        ):
            yield code


def _can_explain(cause: Finding, consequence: Finding) -> bool:
    # What does no harm causes none.
    if cause.severity is Severity.INFO < consequence.severity:
        return False
    if _is_brought_along(consequence):
        return False
    first, later = _begin(cause), _begin(consequence)
    if cause.code == "GS401":
        # What a step does is seen in the next one.
        return first < later
    if first == later and cause.code == "GS503":
        # Of a loss and a gradient that break in the same step, the loss was first.
        return _is_brought_along(cause)
    return first <= later


def _is_brought_along(finding: Finding) -> bool:
    """Whether the batch itself was broken."""
    return any(evidence.entity == "input" for evidence in finding.evidence)


def _begin(finding: Finding) -> int:
    return finding.span[0] if finding.span else 0
