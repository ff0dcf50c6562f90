import re
from collections.abc import Callable

import numpy as np
import pytest

from gradscope.analysis.finding import Evidence, Severity
from gradscope.analysis.report import Skipped
from gradscope.reporters import print_report
from gradscope.reporters.text import TextReporter
from tests.reporters.samples import (
    HOSTILE,
    RULES,
    empty_run,
    finding,
    report_of,
    run_of,
    sick_report,
)

HEALTHY = run_of(np.ones((3, 2)))


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def test_golden_sick(check_golden: Callable[[str, str], None]) -> None:
    check_golden("report_sick.txt", TextReporter().render(sick_report()))


def test_golden_healthy(check_golden: Callable[[str, str], None]) -> None:
    check_golden("report_healthy.txt", TextReporter().render(report_of(HEALTHY)))


def test_no_line_is_longer_than_the_width() -> None:
    long = finding(layer="encoder." * 20 + "weight", message="word " * 60)
    for width in (40, 80):
        lines = TextReporter(width=width).render(report_of(HEALTHY, long)).splitlines()
        assert max(map(len, lines)) <= width
        assert not any(line != line.rstrip() for line in lines)


def test_names_are_not_markup() -> None:
    shown = TextReporter().render(report_of(HEALTHY, finding(layer="[bold]x[/bold] :fire:")))
    assert "[bold]x[/bold] :fire:" in shown


def test_control_characters_are_spelled_out() -> None:
    shown = TextReporter().render(report_of(HEALTHY, finding(layer=HOSTILE)))
    assert "\x1b" not in shown
    assert r"\x1b[31m" in shown


def test_the_worst_ten_and_how_many_more() -> None:
    many = [finding(layer=f"layers.{index}") for index in range(500)]
    shown = TextReporter().render(report_of(HEALTHY, *many))
    assert shown.count("× ERROR") == 10
    assert "And 490 more root causes." in shown
    assert first_line(shown).startswith("500 root causes, training can't work")


def test_a_mild_cause_of_harm_leads() -> None:
    mild = finding("GS104", "poor-initialization", Severity.INFO)
    harm = finding(explained_by=("GS104",))
    other = finding("GS301", "dead-relu", Severity.WARNING, "layers.1")
    shown = TextReporter().render(report_of(HEALTHY, other, mild, harm))
    assert "training can't work" in first_line(shown)
    assert shown.index("poor-initialization at") < shown.index("vanishing-gradient at")
    assert shown.index("vanishing-gradient at") < shown.rindex("dead-relu at")


def test_findings_that_explain_one_another_are_all_shown() -> None:
    one = finding("GS101", "vanishing-gradient", explained_by=("GS003",))
    two = finding("GS003", "zero-gradient", explained_by=("GS101",))
    shown = TextReporter().render(report_of(HEALTHY, one, two))
    assert len(re.findall("ERROR  GS", shown)) == 2


def test_a_consequence_stands_under_the_cause_at_its_layer() -> None:
    causes = [finding(layer=f"layers.{index}") for index in range(3)]
    harm = finding("GS003", "zero-gradient", layer="layers.1", explained_by=("GS101",))
    shown = TextReporter().render(report_of(HEALTHY, *causes, harm))
    order = re.findall(r"(GS\d+) \S+ at (\S+)", shown.partition("\n\n")[2])
    assert order == [
        ("GS101", "layers.0"),
        ("GS101", "layers.1"),
        ("GS003", "layers.1"),
        ("GS101", "layers.2"),
    ]


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (report_of(HEALTHY), "Healthy: no warning, no error."),
        (report_of(HEALTHY, finding(severity=Severity.INFO)), "Healthy: no warning, no error."),
        (report_of(empty_run()), "No verdict: nothing was recorded."),
        (
            report_of(HEALTHY, skipped=tuple(Skipped(r.code, r.name, "x") for r in RULES)),
            "No verdict: none of 4 rules could be checked.",
        ),
        (
            report_of(HEALTHY, finding(severity=Severity.WARNING, layer="3")),
            "1 root cause, training is worse for it: vanishing-gradient at layer 3.",
        ),
        (
            report_of(empty_run(), finding("GS001", "nothing-recorded", layer=None)),
            "1 root cause, training can't work: nothing-recorded.",
        ),
    ],
)
def test_the_verdict_comes_first(report: object, said: str) -> None:
    assert first_line(TextReporter().render(report)) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (20, 20, "Seen at step 20."),
        (0, 20, "Seen in the whole run, steps 0 to 20."),
        (10, 20, "Seen from step 10 to the end, step 20."),
        (0, 10, "Seen from step 0 to step 10."),
    ],
)
def test_since_when(first: int, last: int, said: str) -> None:
    run = run_of(np.ones((3, 2)), steps=(0, 10, 20))
    seen = finding(evidence=(Evidence("grad_norm", "layers.0", first, last, 1.0),))
    assert said in TextReporter().render(report_of(run, seen))


def test_printing_is_the_same_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_report(sick_report())
    assert capsys.readouterr().out == TextReporter().render(sick_report())


def test_printing_in_colour_adds_nothing_but_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_report(sick_report())
    coloured = capsys.readouterr().out
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == TextReporter().render(sick_report())


def test_what_watching_cost() -> None:
    coverage = {"seconds_in_hooks": 2.0, "seconds_watched": 10.0}
    run = run_of(np.ones((3, 2)), meta={"coverage": coverage})
    # Two seconds on top of eight.
    assert "Overhead: 25% of the training time, 2 s in hooks" in re.sub(
        " +", " ", TextReporter().render(report_of(run))
    )
    for unknown in ({}, {"seconds_in_hooks": 0.0, "seconds_watched": 0.0}):
        run = run_of(np.ones((3, 2)), meta={"coverage": unknown})
        assert "Overhead" not in TextReporter().render(report_of(run))
