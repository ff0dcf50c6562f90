"""Cause before consequence: one table of what explains what."""

from collections.abc import Iterable
from dataclasses import replace

from gradscope.analysis.finding import Finding, Severity

# What comes of steps that are too large, or go the wrong way.
_WILD = (
    "GS102",
    "GS401",
    "GS301",
    "GS302",
    "GS306",
    "GS307",
    "GS310",
    "GS303",
    "GS103",
    "GS003",
    "GS505",
    "GS502",
    "GS501",
    "GS503",
    "GS506",
    "GS207",
    "GS206",
    "GS202",
)
# What comes of a signal that does not get through.
_QUIET = ("GS301", "GS302", "GS103", "GS101", "GS310", "GS303", "GS003", "GS404", "GS402", "GS005")

# Cause → what it can explain, directly or through another of these; roots before what they cause.
# Of two that begin at once only the one further up explains the other.
EXPLAINS: dict[str, tuple[str, ...]] = {
    # A batch that holds no numbers breaks everything behind it.
    "GS607": ("GS003", "GS201", "GS202", "GS505", "GS502", "GS501", "GS503", "GS506"),
    # The optimizer steps on what the model has no more: what it has instead is in none.
    "GS008": ("GS001", "GS004", *_QUIET, "GS202"),
    "GS004": (*_QUIET, "GS202"),
    # What the loss asks for can't be had from this output.
    "GS605": ("GS007", "GS310", "GS303"),
    "GS604": (*_QUIET, "GS305", "GS502", "GS501", "GS503"),
    "GS606": ("GS310", "GS303", "GS003"),
    # Sizes far from 1, that each layer or the loss multiplies the signal with.
    "GS602": ("GS603", *_QUIET, *_WILD, "GS201"),
    "GS601": ("GS603", *_QUIET, *_WILD, "GS201"),
    # A scale of the weights that each layer multiplies the signal with.
    "GS104": ("GS603", "GS106", "GS107", *_QUIET, *_WILD),
    # A loss that is summed is a learning rate that is multiplied; one that starts far off pulls
    # that much harder.
    "GS603": (*_WILD, "GS204", "GS201"),
    # Mode, and what is done with gradients between backward and step.
    "GS009": ("GS308", "GS401", "GS501", "GS503"),
    "GS006": (*_WILD, "GS201"),
    "GS007": _WILD,
    # Copies of one unit are one unit.
    "GS105": ("GS310", "GS303", "GS103", "GS101", "GS003"),
    # Steps that are not the gradient's; where decay makes them, it makes the large ones too.
    "GS403": (*_QUIET, "GS401"),
    "GS208": ("GS402", "GS005"),
    "GS404": ("GS402", "GS005"),
    # What a net without a bend, or behind a softmax, can't learn.
    "GS305": _QUIET,
    # One batch that throws the weights elsewhere.
    "GS201": ("GS401", "GS301", "GS302", "GS310", "GS303", "GS003", "GS501", "GS503", "GS202"),
    # A gradient that has grown beyond what a step, or the range of the dtype, can take.
    "GS107": _WILD,
    "GS102": _WILD,
    # A step as large as the weights leaves them where nothing was tuned to be.
    "GS401": ("GS106", "GS101", "GS201", *_WILD),
    # Attention that picks one key, or none.
    "GS307": ("GS306", "GS505", "GS502"),
    # No slope, no gradient for what comes before.
    "GS301": ("GS103", "GS101", "GS310", "GS303", "GS003", "GS404", "GS402", "GS005"),
    "GS302": ("GS103", "GS101", "GS310", "GS303", "GS003", "GS404", "GS402", "GS005"),
    "GS103": ("GS310", "GS303", "GS003", "GS404", "GS402", "GS005"),
    # A gradient that has shrunk below what the dtype, or a step, can show.
    "GS101": ("GS310", "GS303", "GS504", "GS003", "GS404", "GS402", "GS005"),
    "GS310": ("GS303",),
    "GS303": ("GS003",),
    "GS504": ("GS003", "GS402", "GS005"),
    "GS402": ("GS005",),
    "GS005": ("GS402",),
    # The first to leave the range of numbers is the cause of what is broken after it.
    "GS505": ("GS502", "GS501", "GS503", "GS506"),
    "GS502": ("GS501", "GS503", "GS003", "GS506"),
    # A loss without a value has no gradient; a NaN in the gradient is in the weights a step
    # later, then in what they put out.
    "GS501": ("GS003", "GS503"),
    "GS503": ("GS003", "GS502", "GS501"),
    "GS207": ("GS401", "GS501", "GS503"),
    "GS206": ("GS202",),
    "GS202": ("GS207", "GS501"),
}
# That nothing is learned is said for lack of anything better: whatever does harm explains it.
_LAST_RESORT = "GS203"
# When a course began can't be told to the step: what was there at half of it can have caused it.
_COURSES = frozenset({"GS202", "GS206", "GS207"})
_ORDER = {code: place for place, code in enumerate(EXPLAINS)}


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
    causes = {cause.code for cause in found if _can_explain(cause, finding)}
    return sorted(causes, key=lambda code: (_ORDER.get(code, len(_ORDER)), code))


def _can_explain(cause: Finding, consequence: Finding) -> bool:
    # What does no harm causes none.
    if cause.code == consequence.code or cause.severity is Severity.INFO < consequence.severity:
        return False
    if consequence.code == _LAST_RESORT:
        return cause.severity is not Severity.INFO
    return consequence.code in EXPLAINS.get(cause.code, ()) and _comes_before(cause, consequence)


def _comes_before(cause: Finding, consequence: Finding) -> bool:
    first, later = _begin(cause), _begin(consequence)
    if consequence.code in _COURSES and consequence.span:
        later = sum(consequence.span) // 2
    if cause.code == "GS607":
        return first <= later
    if _is_brought_along(consequence):
        return False
    if first == later and _ORDER[cause.code] > _ORDER.get(consequence.code, len(_ORDER)):
        # Of a loss and a gradient that break in the same step, the loss was first; unless the
        # batch broke both.
        return cause.code == "GS503" and _is_brought_along(cause)
    # What a step does is seen in the next one.
    return first < later if cause.code == "GS401" else first <= later


def _is_brought_along(finding: Finding) -> bool:
    """Whether the batch itself was broken."""
    return any(
        evidence.entity in {"input", "target"} and evidence.quantity == "nonfinite"
        for evidence in finding.evidence
    )


def _begin(finding: Finding) -> int:
    return finding.span[0] if finding.span else 0
