"""For the tests of those who train: a run or a report must be healthy."""

from collections.abc import Sequence

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.config import configured_rules, named_rules
from gradscope.analysis.report import Report
from gradscope.record import Run
from gradscope.reporters.text import TextReporter
from gradscope.reporters.wording import has_verdict

__all__ = ["assert_healthy"]


def assert_healthy(judged: Report | Run, *, ignore: Sequence[str] = ()) -> None:
    """Assert that there is neither a warning nor an error; its message is the report.

    judged: a report, or a run, of which one is made by the rules that the project asks for.
    ignore: codes, beginnings of codes, or names of rules whose findings are accepted.

    Raises AssertionError, also where nothing could be judged: silence about nothing is not
    health. Raises ConfigError for an unknown rule in `ignore`.
    """
    report = judged if isinstance(judged, Report) else analyze(judged, configured_rules())
    accepted = {
        rule.code for entry in ignore for rule in named_rules(report.rules, "ignore", entry)
    }
    harmful = [f for f in report.findings if f.severity > f.severity.INFO]
    if not has_verdict(report) or not {f.code for f in harmful} <= accepted:
        raise AssertionError(TextReporter().render(report))
