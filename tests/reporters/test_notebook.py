import base64
import functools
import io
import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import gradscope
from gradscope.analysis.report import Report
from gradscope.quantities import CATALOGUE
from gradscope.record import Run
from gradscope.reporters.figures import DARK, gradient_by_depth
from tests.reporters.pages import Page
from tests.reporters.samples import (
    HOSTILE,
    META,
    empty_run,
    finding,
    report_of,
    run_of,
    sick_report,
)
from tests.reporters.trainings import with_updates


def wide_run(layers: int = 40, steps: int = 2000) -> Run:
    noise = np.exp(np.random.default_rng(0).normal(0, 2, (steps, layers)))
    return run_of(noise, output_norms=noise, loss=noise[:, 0])


def hostile_report() -> Report:
    run = run_of(
        np.ones((3, 2)),
        names=[HOSTILE, '" onmouseover="alert(2)'],
        meta={**META, "model": HOSTILE, "left_out": [HOSTILE]},
    )
    found = finding(layer=HOSTILE, message=HOSTILE, remedies=(HOSTILE, "`" + HOSTILE))
    return report_of(run, found, finding("GS003", layer=HOSTILE, explained_by=("GS101",)))


REPORTS = {
    "sick": sick_report(),
    "healthy": report_of(wide_run(4, 30)),
    "hostile": hostile_report(),
    "empty": report_of(empty_run()),
    "all NaN": report_of(run_of(np.full((3, 3), np.nan))),
}


@functools.cache
def html_of(name: str) -> str:
    """Pictures take a second or two."""
    return REPORTS[name]._repr_html_()


@pytest.mark.parametrize("name", REPORTS)
def test_it_needs_nothing_and_holds_no_script(name: str) -> None:
    page = Page(html_of(name))
    assert not re.search(r"https?://|@import|url\(", html_of(name))
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "a"}
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/png").startswith("data:image/png")


def test_the_verdict_and_the_findings() -> None:
    page = Page(html_of("sick"))
    order = [
        "× 2 root causes, training can't work: poor-initialization at layers.0; made-up.",
        "× ERROR GS104 poor-initialization at layers.0",
        "The weights start 5 times too small. Seen in the whole run, steps 0 to 290.",
        "Call nn.init.kaiming_normal_ before training.",
        "Early layers learn nothing",
        "This explains 2 more",
        "error: GS101 vanishing-gradient at layers.0",
        "warning: GS003 zero-gradient at layers.0.weight",
        "! WARNING GS999 made-up",
        "GS301 dead-relu at layers.[1]",
        "Checked: 3 of 4 rules",
        "modules that never ran: unused",
    ]
    positions = [page.text.find(said) for said in order]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert "✓ Healthy: no warning, no error." in Page(html_of("healthy")).text


def test_hostile_names_are_text() -> None:
    html = html_of("hostile") + REPORTS["hostile"].run._repr_html_()
    page = Page(html)
    assert page.text.count(HOSTILE.replace("\x1b", r"\x1b")) > 6
    assert "\x1b" not in html
    assert "<img src=x" not in html


def picture(attributes: dict[str, str | None]) -> Image.Image:
    _, _, content = (attributes["src"] or "").partition(";base64,")
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True))).convert("RGB")


def test_pictures_for_light_and_dark_notebooks() -> None:
    images = Page(html_of("healthy")).all("img")
    light = [attributes for attributes in images if attributes["class"] == "gs-light"]
    dark = [attributes for attributes in images if attributes["class"] == "gs-dark"]
    assert len(light) == len(dark) == 4
    for attributes in light:
        assert min(picture(attributes).getpixel((2, 2))) > 240  # type: ignore[arg-type]
    for attributes in dark:
        assert max(picture(attributes).getpixel((2, 2))) < 60  # type: ignore[arg-type]
        # Where a notebook drops the style sheet, light ones alone are seen.
        assert attributes["style"] == "display:none"


def test_it_is_small_whatever_the_run() -> None:
    many = [finding(layer=f"layers.{index}") for index in range(500)]
    html = report_of(wide_run(), *many)._repr_html_()
    assert len(html) < 300_000
    assert "And 495 more root causes." in Page(html).text
    assert Page(html).all("img")


def test_a_run_in_a_notebook() -> None:
    run = run_of(np.ones((3, 2)), steps=(0, 10, 20), loss=np.ones(3))
    page = Page(run._repr_html_())
    for said in ("Sequential, 12,345", "0 to 20, 3 recorded", "run.parameters", "3 steps × 2 ent"):
        assert said in page.text
    assert "loss" in page.text.partition("run.scalars")[2]
    assert "none was seen" in Page(empty_run()._repr_html_()).text


def test_the_text_beside_it_is_one_short_line() -> None:
    run = wide_run(500, 3)
    assert repr(run) == "Run('Sequential', 3 steps seen, 3 recorded)"
    known = len(CATALOGUE["parameters"])
    assert repr(run.parameters) == f"Table(3 steps × 500 entities × {known} quantities)"
    assert repr(run.histograms) == "Histograms(0 steps × 0 entities)"
    assert repr(sick_report()) == "Report(5 findings, 1 rules skipped)"


def test_a_figure_shows_itself_in_a_notebook_without_pyplot() -> None:
    figure = gradient_by_depth(REPORTS["healthy"].run, theme=DARK)
    before = dict(mpl.rcParams)
    content, size = figure._repr_png_()  # type: ignore[attr-defined]
    assert dict(mpl.rcParams) == before
    image = Image.open(io.BytesIO(content))
    # Sharp: two pixels for each of the notebook's.
    assert image.size == pytest.approx((2 * size["width"], 2 * size["height"]), abs=1)
    red, green, blue = (int(DARK.paper[at : at + 2], 16) for at in (1, 3, 5))
    assert image.convert("RGB").getpixel((2, 2)) == (red, green, blue)


def test_the_figures_are_public_and_looked_up_when_used() -> None:
    code = """
import sys, gradscope
assert "matplotlib" not in sys.modules
assert gradscope.figures.__all__ == sorted(gradscope.figures.__all__)
from gradscope.figures import update_ratio
assert gradscope.figures.update_ratio is update_ratio
print("matplotlib.pyplot" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False False\n", done.stderr


def test_updates_are_shown_where_they_were_measured() -> None:
    html = report_of(with_updates(np.full((9, 5), 1e-3)))._repr_html_()
    descriptions = [attributes["alt"] for attributes in Page(html).all("img")]
    assert "Size of the updates relative to the weights" in descriptions
    assert gradscope.figures.update_ratio(wide_run(2, 2)).axes[0].texts
