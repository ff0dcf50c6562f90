"""docs/support.md says what the tests of the set-ups show, no more and no less."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.setups.support import support

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS = ("parameters", "outputs", "output_gradients")
AREAS = (
    "Optimizers",
    "Loops",
    "Clipping",
    "Precision",
    "Modules",
    "Functional calls",
    "Recurrent nets",
    "Autograd",
    "torch.compile",
    "Distributed",
    "Models",
)


@dataclass
class Row:
    """A set-up, and what is shown of it."""

    verdicts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    tests: dict[str, None] = field(default_factory=dict)

    def add(self, mark: pytest.Mark, test: str) -> None:
        for column in COLUMNS:
            verdict = mark.kwargs[column]
            if verdict is not None:
                known = self.verdicts.setdefault(column, verdict)
                assert known == verdict, f"{mark.args}: {column} is {known} and {verdict}"
        if mark.kwargs["note"]:
            self.notes[mark.kwargs["note"]] = None
        self.tests[test] = None


def claims() -> Iterator[tuple[pytest.Mark, str]]:
    """Every mark, and the file of the test that shows it."""
    for folder in ("setups", "models"):
        for path in sorted((HERE.parent / folder).glob("test_*.py")):
            if path.name != Path(__file__).name:
                module = importlib.import_module(f"tests.{folder}.{path.stem}")
                for test in vars(module).values():
                    if inspect.isfunction(test) and test.__module__ == module.__name__:
                        yield from ((mark, f"{folder}/{path.name}") for mark in marks_of(test))


def marks_of(test: Callable[..., object]) -> Iterator[pytest.Mark]:
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "support":
            yield mark
        elif mark.name == "parametrize":
            for one in mark.args[1]:
                # A ParameterSet; anything else has no marks.
                for nested in getattr(one, "marks", ()):
                    found = getattr(nested, "mark", nested)
                    if found.name == "support":
                        yield found


def page() -> str:
    """The whole page."""
    areas: dict[str, dict[str, Row]] = {area: {} for area in AREAS}
    for mark, test in claims():
        area, setup = mark.args
        areas[area].setdefault(setup, Row()).add(mark, test)
    parts = [(HERE / "support.md.in").read_text(encoding="utf-8").rstrip()]
    for area, rows in areas.items():
        if rows:
            parts.append(f"## {area}\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| set-up | parameters | outputs | output gradients | shown by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for setup, row in rows.items():
        verdicts = " | ".join(row.verdicts.get(column, "–") for column in COLUMNS)
        tests = ", ".join(f"[{Path(test).stem}](../tests/{test})" for test in row.tests)
        noted = "".join(f"<br>{note}" for note in row.notes)
        lines.append(f"| {setup}{noted} | {verdicts} | {tests} |")
    return "\n".join(lines)


def test_the_page_is_what_the_tests_show(request: pytest.FixtureRequest) -> None:
    path, made = ROOT / "docs" / "support.md", page()
    if request.config.getoption("--update-golden"):
        path.write_text(made, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == made, "run pytest --update-golden, read the diff"


def test_claims_that_contradict_each_other_are_an_error() -> None:
    row = Row()
    row.add(support("Loops", "x", outputs="right").mark, "one")
    with pytest.raises(AssertionError, match="outputs is right and labelled"):
        row.add(support("Loops", "x", outputs="labelled").mark, "two")
