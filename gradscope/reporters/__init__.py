"""Reporters: a report → text, JSON, HTML, TensorBoard."""

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Protocol, cast

from gradscope.analysis.report import Report
from gradscope.errors import ConfigError


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
    ".txt": "text.TextReporter",
}


def write_report(report: Report, path: str | PathLike[str]) -> None:
    """Write the report to a file; its suffix picks the reporter.

    Folders on the way are made. Raises ConfigError for an unknown suffix, OSError where the
    file can't be written.
    """
    target = Path(path)
    content = _reporter_for(target).render(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")


def print_report(report: Report) -> None:
    """Print the report to the terminal."""
    from gradscope.reporters.text import print_text  # noqa: PLC0415  (only when asked for)

    print_text(report)


def _reporter_for(path: Path) -> Reporter:
    home = _HOMES.get(path.suffix.lower())
    if home is None:
        message = f"no report format for {path.name!r}; end the name in {', '.join(_HOMES)}"
        raise ConfigError(message)
    module, _, name = home.partition(".")
    made = getattr(import_module(f"gradscope.reporters.{module}"), name)()
    return cast("Reporter", made)
