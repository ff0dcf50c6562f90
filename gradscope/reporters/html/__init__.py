"""The report as one HTML page that needs nothing else: no script, no request."""

from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from gradscope.analysis.finding import Severity
from gradscope.analysis.report import Report
from gradscope.analysis.words import number
from gradscope.reporters.html.pictures import pictures
from gradscope.reporters.html.sheets import sheets
from gradscope.reporters.outline import outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.wording import (
    checked,
    has_verdict,
    inert,
    place,
    since,
    skipped_by_reason,
    steps,
    verdict,
    why,
)

_MAX_CAUSES = 50
_MAX_CONSEQUENCES = 20


@dataclass(frozen=True, slots=True)
class HtmlReporter:
    """One static page."""

    suffix: str = ".html"

    def render(self, report: Report) -> str:
        """The whole page."""
        branches = outline(report)
        harmful = [branch for branch in branches if branch.harmful]
        notes = [finding for branch in branches if not branch.harmful for finding in branch]
        page: str = _template().render(
            css=Markup(_own("page.css")),  # noqa: S704  (a file of this package)
            report=report,
            title=str(report.run.meta.get("model", "a run")),
            verdict=verdict(report),
            state=_state(report, harmful[0].severity if harmful else None),
            checked=checked(report),
            causes=harmful[:_MAX_CAUSES],
            causes_left_out=len(harmful[_MAX_CAUSES:]),
            notes=notes[:_MAX_CAUSES],
            notes_left_out=len(notes[_MAX_CAUSES:]),
            max_consequences=_MAX_CONSEQUENCES,
            pictures=pictures(report),
            sheets=sheets(report),
            skipped=skipped_by_reason(report),
            unseen=unseen(report.run),
            particulars=particulars(report.run),
        )
        return page


def _state(report: Report, worst: Severity | None) -> str:
    if worst is not None:
        return worst.value
    return "healthy" if has_verdict(report) else "info"


def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=_prose, number=number)
    environment.globals.update(place=place, since=since, steps=steps, why=why)
    return environment.from_string(_own("page.html"))


def _own(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _inert(value: object) -> object:
    # What is Markup already has been through here.
    return inert(value) if type(value) is str else value


def _prose(text: str) -> Markup:
    """A sentence in which what stands between backticks is code."""
    parts = [escape(inert(part)) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(inert(text))
    code = Markup("<code>{}</code>")
    return Markup("").join(
        code.format(part) if index % 2 else part for index, part in enumerate(parts)
    )
