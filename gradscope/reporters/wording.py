"""How a report speaks: its verdict, its names, its step ranges."""

from gradscope.analysis.coverage import elsewhere
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report
from gradscope.analysis.words import count, layer_in_words
from gradscope.record import Run
from gradscope.reporters.outline import outline

_HARM = {
    Severity.ERROR: "training can't work",
    Severity.WARNING: "training is worse for it",
}
_NAMED_IN_VERDICT = 2


def verdict(report: Report) -> str:
    """The report in one sentence."""
    harmful = [branch for branch in outline(report) if branch.harmful]
    if harmful:
        named = [place(branch.finding) for branch in harmful[:_NAMED_IN_VERDICT]]
        unnamed = len(harmful) - len(named)
        more = f"; and {unnamed} more" if unnamed else ""
        causes, harm = count(len(harmful), "root cause"), _HARM[harmful[0].severity]
        return f"{causes}, {harm}: {'; '.join(named)}{more}."
    if other := elsewhere(report.run):
        return f"No verdict here: {other}."
    if not len(report.run.recorded_steps):
        return "No verdict: nothing was recorded."
    if not has_verdict(report):
        return f"No verdict: none of {count(len(report.rules), 'rule')} could be checked."
    return "Healthy: no warning, no error."


def has_verdict(report: Report) -> bool:
    """Whether anything could be judged; silence about nothing is not health."""
    judged = len(report.run.recorded_steps) > 0 and len(report.skipped) < len(report.rules)
    return judged or not report.healthy


def place(finding: Finding) -> str:
    """What is wrong, and where."""
    if not finding.layer:
        return finding.name
    return f"{finding.name} at {inert(layer_in_words(finding.layer))}"


def title(finding: Finding) -> str:
    """A finding in a heading."""
    return f"{finding.code} {place(finding)}"


def checked(report: Report) -> str:
    """How many rules were checked, over how many steps."""
    asked, skipped = len(report.rules), len(report.skipped)
    rules = f"{asked - skipped} of {count(asked, 'rule')}" if skipped else count(asked, "rule")
    return f"{rules} on {count(len(report.run.recorded_steps), 'recorded step')}"


def skipped_by_reason(report: Report) -> dict[str, list[str]]:
    """Reason → the rules that were skipped for it."""
    reasons: dict[str, list[str]] = {}
    for rule in report.skipped:
        reasons.setdefault(rule.reason, []).append(f"{rule.code} {rule.name}")
    return reasons


def why(report: Report, finding: Finding) -> str:
    """Why it matters: the first paragraph of the rule's page; "" where there is none."""
    return _of_page(report, finding, "Why it matters")


def how_sure(report: Report, finding: Finding) -> str:
    """How sure it is, by the rule's page; "" where it says nothing."""
    return _of_page(report, finding, "How sure it is")


def _of_page(report: Report, finding: Finding, title: str) -> str:
    asked = (rule for rule in report.rules if rule.code == finding.code)
    return next((rule.section(title) for rule in asked), "").partition("\n\n")[0]


def since(finding: Finding, run: Run) -> str:
    """At which steps it was seen; "" without evidence."""
    if finding.span is None:
        return ""
    first, last = finding.span
    recorded = run.recorded_steps
    if first == last:
        return f"at step {first}"
    if len(recorded) and last >= recorded[-1]:
        if first <= recorded[0]:
            return f"in the whole run, steps {first} to {last}"
        return f"from step {first} to the end, step {last}"
    return f"from step {first} to step {last}"


def steps(first: int, last: int) -> str:
    """A step or a range of steps, for a table."""
    return str(first) if first == last else f"{first} to {last}"


def inert(text: str) -> str:
    """The text with control characters and the like spelled out: a name can be anything."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
