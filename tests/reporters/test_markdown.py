import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt

from gradscope.analysis.finding import Evidence, Severity
from gradscope.analysis.report import Report, Skipped
from gradscope.reporters.markdown import MarkdownReporter, code, escaped, prose
from tests.reporters.samples import (
    HOSTILE,
    META,
    RULES,
    empty_run,
    finding,
    report_of,
    run_of,
    sick_report,
)

# A reader of Markdown that is not ours: CommonMark with the tables that GitHub has.
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
MENACING = (
    "@torvalds #1 GH-1 https://x.y www.x.y ~~s~~ **b** _i_ `c` a|b \\| [l](u) ![i](u) <b> &amp; -->"
)
HEALTHY = run_of(np.ones((3, 2)))


class Page(HTMLParser):
    """What a reader sees, text by text, and which elements there are."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[tuple[bool, str]] = []
        self._in_code = 0
        self.feed(READER.render(markdown))
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self.tags.append(tag)
        self._in_code += tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self._in_code -= tag == "code"

    def handle_data(self, data: str) -> None:
        self.texts.append((self._in_code > 0, data))

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)

    @property
    def calls(self) -> list[str]:
        """What GitHub would link, in each text by itself, code left out."""
        pattern = re.compile(r"@\w+|#\d+|GH-\d+|https?://\S|www\.\S")
        return [found for coded, text in self.texts if not coded for found in pattern.findall(text)]


def page_of(report: Report) -> Page:
    return Page(MarkdownReporter().render(report))


def test_golden_sick(check_golden: Callable[[str, str], None]) -> None:
    check_golden("report_sick.md", MarkdownReporter().render(sick_report()))


def test_golden_healthy(check_golden: Callable[[str, str], None]) -> None:
    check_golden("report_healthy.md", MarkdownReporter().render(report_of(HEALTHY)))


def test_what_a_reader_sees() -> None:
    page = page_of(sick_report())
    order = [
        "2 root causes, training can't work",
        "ERROR: GS104 poor-initialization at layers.0",
        "The weights start 5 times too small. Seen in the whole run, steps 0 to 290.",
        "Call nn.init.kaiming_normal_ before training.",
        "error: GS101 vanishing-gradient at layers.0",
        "warning: GS003 zero-gradient at layers.0.weight",
        "Evidence, and why it matters",
        "Early layers learn nothing",
        "1.23e-6",
        "WARNING: GS999 made-up",
        "info: GS301 dead-relu at layers.[1]",
        "Skipped: GS301 dead-relu (not measured: modules.dead_unit_fraction)",
        "Log: runs/first",
    ]
    positions = [page.text.find(said) for said in order]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert page.tags.count("details") == page.tags.count("summary") == 3
    assert page.tags.count("table") == 1


@pytest.mark.parametrize("name", [HOSTILE, MENACING, "|", "`", "\\", " ", "- x", "1. x", "名前"])
def test_names_are_text_and_call_nobody(name: str) -> None:
    run = run_of([[1.0]], meta={**META, "model": name, "device": name, "left_out": [name]})
    found = finding(
        layer=name,
        message=f"{name} is sick.",
        evidence=(Evidence(name, name, 0, 0, 1.0, 2.0),) * 2,
        remedies=(name, f"Call `{name}`."),
    )
    note = finding("GS301", "dead-relu", Severity.INFO, name, name)
    page = page_of(report_of(run, found, note, skipped=(Skipped("GS301", "x", name),)))
    spelled_out = name.replace("\x1b", r"\x1b").strip()
    assert page.text.count(spelled_out) >= 10
    assert page.calls == []
    plain = page_of(report_of(run_of([[1.0]]), found, note))
    assert not set(plain.tags) & {"a", "b", "img", "s", "em", "script", "h1", "pre", "blockquote"}
    # Two lines of evidence of five cells each.
    assert page.tags.count("td") == 10
    assert page.tags.count("table") == 1


def test_the_reader_does_see_what_is_not_escaped() -> None:
    """The meta-test: without escaping the check above would fail."""
    page = Page(MENACING)
    assert page.calls == ["@torvalds", "#1", "GH-1", "https://x", "www.x"]
    assert {"s", "strong", "em", "code", "a", "img", "b"} <= set(page.tags)


@pytest.mark.parametrize("text", [MENACING, HOSTILE, "a_b", "10 layers", "- a", "3) b", "...", ""])
def test_escaped_and_code_read_as_they_were_written(text: str) -> None:
    spelled_out = text.replace("\x1b", r"\x1b")
    assert Page(escaped(text)).text.strip() == spelled_out
    assert Page(f"x {code(text)}").text.strip() == f"x {spelled_out}".strip()
    assert Page(escaped(text)).tags in (["p"], [])


def test_plain_names_stay_readable_in_the_source() -> None:
    assert code("encoder.layers_0.weight") == "`encoder.layers_0.weight`"
    assert prose("Call `nn.init.zeros_` first.") == "Call `nn.init.zeros_` first."
    assert prose("an odd ` in it") == "an odd \\` in it"


def test_many_findings_are_cut_and_counted() -> None:
    roots = [finding(layer=f"layers.{index}") for index in range(500)]
    under = [finding("GS003", "zero-gradient", layer="x", explained_by=("GS101",))] * 40
    notes = [finding("GS301", "dead-relu", Severity.INFO, f"n{index}") for index in range(40)]
    text = page_of(report_of(HEALTHY, *roots, *under, *notes)).text
    assert text.count("ERROR: GS101") == 10
    assert "And 490 more root causes." in text
    assert text.count("error: GS003") == text.count("info: GS301") == 10
    assert text.count("and 30 more") == 2


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (report_of(empty_run()), "No verdict: nothing was recorded."),
        (report_of(run_of(np.full((1, 1), np.nan), meta={})), "Healthy: no warning, no error."),
    ],
)
def test_empty_runs(report: Report, said: str) -> None:
    page = page_of(report)
    assert page.text.startswith(said)
    assert f"Checked: {len(RULES)} rules" in page.text
