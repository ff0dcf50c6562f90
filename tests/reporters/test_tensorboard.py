import re
import warnings
from html.parser import HTMLParser

import numpy as np

from gradscope.analysis.finding import Severity
from gradscope.reporters.tensorboard import findings_markdown
from tests.reporters.samples import HOSTILE, empty_run, finding, report_of, run_of, sick_report


class Text(HTMLParser):
    """What a reader sees, and which tags there are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(markdown: str) -> Text:
    """As TensorBoard renders it."""
    with warnings.catch_warnings():
        # TensorBoard's own copy of an old library.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html

    return Text(markdown_to_safe_html(markdown))


def test_what_a_reader_sees() -> None:
    seen = shown(findings_markdown(sick_report()))
    assert seen.text.startswith("2 root causes, training can't work")
    assert "ERROR: GS104 poor-initialization at layers.0" in seen.text
    assert "Call `nn.init.kaiming_normal_` before training." in seen.text
    assert "error: GS101 vanishing-gradient at layers.0" in seen.text
    assert "info: GS301 dead-relu at layers.[1]" in seen.text
    assert "Skipped: GS301 dead-relu" in seen.text
    assert {"h2", "h3", "ol", "ul", "li"} <= seen.tags


def test_hostile_names_are_text() -> None:
    name = HOSTILE + "[link](javascript:alert) ![i](x) # h +++ 1."
    seen = shown(findings_markdown(report_of(run_of([[1.0]]), finding(layer=name))))
    assert name.replace("\x1b", r"\x1b") in seen.text
    assert not seen.tags & {"script", "img", "a", "em", "code", "table"}


def test_a_healthy_and_an_empty_run() -> None:
    healthy = findings_markdown(report_of(run_of(np.ones((2, 2)))))
    assert shown(healthy).text.startswith("Healthy: no warning, no error.")
    empty = findings_markdown(report_of(empty_run()))
    assert shown(empty).text.startswith("No verdict: nothing was recorded.")


def test_many_findings_are_cut_and_counted() -> None:
    roots = [finding(layer=f"layers.{index}") for index in range(500)]
    notes = [finding("GS301", "dead-relu", Severity.INFO, f"n{index}") for index in range(40)]
    seen = shown(findings_markdown(report_of(run_of([[1.0]]), *roots, *notes)))
    assert len(re.findall("ERROR: GS101", seen.text)) == 10
    assert "And 490 more root causes." in seen.text
    assert len(re.findall("info: GS301", seen.text)) == 10
    assert "and 30 more" in seen.text
