import io
import re
import warnings
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from gradscope.analysis.finding import Severity
from gradscope.record import Run
from gradscope.reporters.figures import LIGHT
from gradscope.reporters.tensorboard import findings_markdown, pictures, worst_layers_markdown
from tests.reporters.samples import (
    HOSTILE,
    empty_run,
    finding,
    module,
    parameter,
    report_of,
    run_of,
    sick_report,
    table,
)


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
    assert "Call nn.init.kaiming_normal_ before training." in seen.text
    assert "error: GS101 vanishing-gradient at layers.0" in seen.text
    assert "info: GS301 dead-relu at layers.[1]" in seen.text
    assert "Skipped: GS301 dead-relu" in seen.text
    assert {"h2", "h3", "ol", "ul", "li"} <= seen.tags


def test_hostile_names_are_text() -> None:
    name = HOSTILE + "[link](javascript:alert) ![i](x) # h +++ 1."
    seen = shown(findings_markdown(report_of(run_of([[1.0]]), finding(layer=name))))
    assert name.replace("\x1b", r"\x1b") in seen.text
    assert not seen.tags & {"script", "img", "a", "em", "table"}


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


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of the first table, without its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def layers_run(
    norms: list[list[float]], names: list[str], groups: list[str], **more: object
) -> Run:
    entities = [parameter(name, row, groups[row]) for row, name in enumerate(names)]
    modules = [module("relu"), module("tanh", 1), module("fine", 2)]
    steps = range(len(norms))
    known: dict[str, Any] = {"grad_norm": norms, **more}
    return Run(
        table("parameters", entities, steps, **known),
        table(
            "modules",
            modules,
            steps,
            dead_unit_fraction=[0.5, np.nan, 0.0],
            output_saturated_fraction=[np.nan, 0.75, 0.0],
        ),
        table("signals", [], steps),
        np.array(steps, np.int64),
        {},
    )


def test_worst_layers_are_those_farthest_from_the_median_of_their_kind() -> None:
    names = ["a.weight", "b.weight", "c.weight", "a.bias", "b.bias", "c.bias"]
    groups = ["weight"] * 3 + ["bias"] * 3
    # Twelve steps: the first two, wildly different, are no longer of the latest ten.
    early, late = [1e9] * 6, [8.0, 2.0, 1.0, 3e-4, 3e-2, 3e-2]
    run = layers_run([early] * 2 + [late] * 10, names, groups, update_ratio=1e-3)
    markdown = worst_layers_markdown(run)
    rows = [[cell.replace("\\", "") for cell in row] for row in rows_of(markdown)]
    assert rows[:3] == [
        ["a.bias", "bias", "3e-4", "0.01 ×", "0.001"],
        ["a.weight", "weight", "8", "4 ×", "0.001"],
        ["c.weight", "weight", "1", "0.5 ×", "0.001"],
    ]
    assert "10 recorded steps, 2 to 11" in markdown
    seen = shown(markdown)
    assert {"table", "th", "td"} <= seen.tags
    # Modules without a dead or saturated unit are not listed.
    assert seen.text.index("tanh") < seen.text.index("relu")
    assert "75%" in seen.text
    assert "fine" not in seen.text


def test_broken_and_zero_gradients_lead() -> None:
    names = ["a", "b", "c", "d"]
    norms = [[1.0, 100.0, 0.0, 1.0]] * 3
    nonfinite = [[0, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0]]
    run = layers_run(norms, names, ["weight"] * 4, grad_nonfinite=nonfinite)
    rows = rows_of(worst_layers_markdown(run))
    assert [row[0] for row in rows[:3]] == ["c", "d", "b"]
    assert rows[0][2:] == ["0", "0 ×", "not measured"]
    assert rows[1][2] == "NaN or infinite"


def test_worst_layers_of_many_of_odd_and_of_no_layers() -> None:
    many = run_of(np.exp(np.arange(1000.0) % 7)[None])
    assert len(rows_of(worst_layers_markdown(many).partition("## Layers")[0])) == 10
    seen = shown(worst_layers_markdown(run_of([[1.0, 2.0]], names=[HOSTILE, "b"])))
    assert HOSTILE.replace("\x1b", r"\x1b") in seen.text
    assert not seen.tags & {"script", "img"}
    assert worst_layers_markdown(empty_run()) == "Nothing was recorded.\n"
    unmeasured = worst_layers_markdown(run_of(np.full((2, 2), np.nan)))
    assert "No gradient was measured." in unmeasured
    assert "Neither was measured." in unmeasured
    still = worst_layers_markdown(run_of(np.zeros((2, 3))))
    assert len(rows_of(still)) == 3


def test_pictures_are_small_pngs() -> None:
    generator = np.random.default_rng(0)
    # Noise compresses worst.
    grid = np.exp(generator.normal(0, 2, (300, 200)))
    made = pictures(report_of(run_of(grid, output_norms=grid)))
    assert set(made) == {"heatmap", "gradient_by_depth"}
    for png in made.values():
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG"
        assert image.width > 800
        assert len(png) < 160_000
        assert len(np.unique(np.asarray(image))) > 10
    assert pictures(report_of(empty_run())) == {}


def test_a_picture_keeps_the_colour_of_what_is_not_finite() -> None:
    norms = np.exp(-np.add.outer(np.arange(100) / 50, np.arange(20) / 2))
    broken = np.zeros_like(norms)
    broken[40:43, 3] = 1
    png = pictures(report_of(run_of(norms, nonfinite=broken)))["heatmap"]
    colors = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).astype(int)
    # The colour of the theme, as near as a palette comes.
    wanted = np.array([int(LIGHT.nonfinite[at : at + 2], 16) for at in (1, 3, 5)])
    assert (np.abs(colors - wanted).max(axis=1) <= 16).sum() > 20


def test_a_picture_of_odd_names_does_not_warn_and_leaves_the_settings_alone() -> None:
    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures(report_of(run_of([[1.0, 2.0]], names=[HOSTILE, "名前"])))
    assert dict(mpl.rcParams) == before
