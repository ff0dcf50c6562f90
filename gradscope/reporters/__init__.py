"""Reporters: a report → text, JSON, HTML, Markdown, notebook, TensorBoard."""

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Protocol, cast

from gradscope.analysis.report import Report
from gradscope.errors import ConfigError
from gradscope.record import Run


class Reporter(Protocol):
    """Turns a report into the content of one file; options are fields of the reporter."""

    @property
    def suffix(self) -> str:
        """The ending of the files it makes."""

    def render(self, report: Report) -> str:
        """The whole content; pure."""


# Looked up when used: matplotlib takes a second to import.
_HOMES = {
    ".html": "html.HtmlReporter",
    ".json": "json.JsonReporter",
    ".md": "markdown.MarkdownReporter",
    ".txt": "text.TextReporter",
}


def write_report(report: Report, path: str | PathLike[str]) -> None:
    """Write the report to a file; its suffix picks the reporter.

    Folders on the way are made. Raises ConfigError for an unknown suffix, OSError where the
    file can't be written.
    """
    target = Path(path)
    _write(target, _reporter_for(target).render(report))


def write_reports(reports: Sequence[Report], path: str | PathLike[str]) -> None:
    """Write several reports to one HTML page, side by side; a single one to any format.

    Raises ConfigError for several in another format than HTML, else like `write_report`.
    """
    target = Path(path)
    if len(reports) == 1:
        write_report(reports[0], target)
        return
    if target.suffix.lower() != ".html":
        message = f"{target.name!r}: only an HTML page holds several runs; end the name in .html"
        raise ConfigError(message)
    from gradscope.reporters.html import render_side_by_side  # noqa: PLC0415

    _write(target, render_side_by_side(reports))


def print_report(report: Report) -> None:
    """Print the report to the terminal."""
    from gradscope.reporters.text import print_text  # noqa: PLC0415  (only when asked for)

    print_text(report)


def report_html(report: Report) -> str:
    """The report as a notebook shows it."""
    from gradscope.reporters import notebook  # noqa: PLC0415  (matplotlib takes a second)

    return notebook.report_html(report)


def run_html(run: Run) -> str:
    """The run as a notebook shows it."""
    from gradscope.reporters import notebook  # noqa: PLC0415

    return notebook.run_html(run)


def _write(target: Path, content: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")


def _reporter_for(path: Path) -> Reporter:
    home = _HOMES.get(path.suffix.lower())
    if home is None:
        message = f"no report format for {path.name!r}; end the name in {', '.join(_HOMES)}"
        raise ConfigError(message)
    module, _, name = home.partition(".")
    made = getattr(import_module(f"gradscope.reporters.{module}"), name)()
    return cast("Reporter", made)
