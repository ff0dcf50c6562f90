"""Whole pages, opened from disk: they ask for nothing, complain of nothing, and show it all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.report import Report
from gradscope.log.reader import load
from gradscope.reporters.html import HtmlReporter
from tests.demo import Demo, runs_of
from tests.reporters.samples import HOSTILE, empty_run, finding, report_of, run_of, sick_report
from tests.viewer.browser import Opened, opened
from tests.viewer.runs import marked_report, noise, whole_run

Open = Callable[..., Opened]


def many_findings() -> Report:
    roots = [finding(layer=f"stage{index % 8 // 4}.layer{index % 8}") for index in range(500)]
    return report_of(whole_run(noise(20, 8)), *roots)


def broken_everywhere() -> Report:
    norms = np.full((12, 4), np.nan)
    return report_of(whole_run(norms, nonfinite=7.0), finding(layer="stage0.layer0"))


EDGES: dict[str, Callable[[], Report]] = {
    "no finding": lambda: report_of(whole_run(noise(30, 6))),
    "500 findings": many_findings,
    "one step": lambda: marked_report(whole_run(noise(1, 5))),
    "two steps far apart": lambda: report_of(run_of(noise(2, 3), steps=[0, 100_000])),
    "a single layer": lambda: report_of(whole_run(noise(30, 1))),
    "NaN everywhere": broken_everywhere,
    "nothing measured": lambda: report_of(run_of(np.full((3, 3), np.nan))),
    "zero everywhere": lambda: report_of(whole_run(np.zeros((9, 4)))),
    "nothing recorded": lambda: report_of(empty_run()),
    "one of everything": sick_report,
}


@pytest.mark.parametrize("make", EDGES.values(), ids=EDGES)
def test_a_page_is_quiet_and_asks_for_nothing(make: Callable[[], Report], open_page: Open) -> None:
    page = open_page(make(), static=True)
    assert page.complaints == []
    assert len(page.requests) == 1
    assert page.page.locator("h1").inner_text().strip()
    # No picture is a blank frame.
    for canvas in page.page.locator("canvas.gs-canvas").all():
        box = canvas.bounding_box()
        assert box is not None
        assert box["width"] > 200


def test_200_layers_by_2000_steps_are_small_and_whole(browser: Browser, tmp_path: Path) -> None:
    # Noise in every digit compresses worst.
    norms = np.exp(np.random.default_rng(0).normal(0, 2, (2000, 200)))
    run = whole_run(norms)
    page_text = HtmlReporter().render(marked_report(run))
    assert len(page_text.encode()) <= 3_000_000
    path = tmp_path / "large.html"
    path.write_text(page_text, encoding="utf-8")
    page = opened(browser, path)
    assert page.complaints == []
    assert len(page.requests) == 1
    assert page.page.locator("canvas.gs-canvas").count() == 6
    page.point_at("heatmap", 0.7, 0.5)
    name, said = page.tooltip("heatmap").split("\n")[:2]
    step = int(said.removeprefix("step ").partition(":")[0])
    value = run.parameters["grad_norm"][step, run.parameters.names.index(name)]
    assert float(said.partition("= ")[2].replace(",", "")) == pytest.approx(value, rel=6e-3)
    page.page.context.close()


def test_the_demos_pages_open(demo: Demo, browser: Browser) -> None:
    pages = [Path(f"{folder}.html") for folder in runs_of(demo)]
    assert len(pages) == 3
    for path in pages:
        page = opened(browser, path)
        assert page.complaints == []
        assert page.requests == [path.as_uri()]
        run = load(path.with_suffix(""))
        page.canvas("heatmap").focus()
        page.page.keyboard.press("ArrowRight")
        first = run.parameters.names[0]
        assert page.readout().startswith(f"{first} · step 0: ")
        assert page.page.locator("h1").inner_text().strip()
        page.page.context.close()


def test_the_demos_runs_side_by_side(demo: Demo, open_page: Open) -> None:
    folders = runs_of(demo)
    page = open_page(*(analyze(load(folder)) for folder in folders))
    assert page.complaints == []
    for view in ("profile", "heatmap", "ridgelines", "tree"):
        titles = page.page.locator(f'[data-view="{view}"] .panel > .run-name').all_inner_texts()
        assert titles == [folder.name for folder in folders]


def test_hostile_names_are_shown_and_not_run(open_page: Open) -> None:
    names = [HOSTILE, "<img src=x onerror=alert(1)>", "`${alert(2)}`", "__proto__", "constructor"]
    run = whole_run(noise(20, 5), names=names, folder=HOSTILE)
    report = report_of(run, finding(layer=HOSTILE, message=HOSTILE))
    page = open_page(report, report, static=True)
    assert page.complaints == []
    assert len(page.requests) == 1
    assert page.page.locator("img:not(.static img)").count() == 0
    page.point_at("heatmap", 0.7, 0.17)
    spelled_out = HOSTILE.replace("\x1b", r"\x1b")
    assert page.tooltip("heatmap").startswith(f"{spelled_out}.weight\nstep ")
    for name in names[1:]:
        assert page.page.get_by_text(name, exact=True).count() > 0
    page.page.locator('[data-view="ridgelines"] select').first.select_option("0")
    assert page.complaints == []


def test_print_shows_the_static_pictures(open_page: Open) -> None:
    page = open_page(marked_report(whole_run(noise(30, 6))), static=True)
    static = page.page.locator(".static img")
    assert static.count() == 3
    assert not any(picture.is_visible() for picture in static.all())
    page.page.emulate_media(media="print")
    assert all(picture.is_visible() for picture in static.all())
    assert not any(canvas.is_visible() for canvas in page.page.locator("canvas").all())
    assert not page.page.locator("#quantity").is_visible()


def test_without_script_the_static_pictures_are_there(open_page: Open) -> None:
    page = open_page(marked_report(whole_run(noise(30, 6))), static=True, scripts=False)
    assert all(picture.is_visible() for picture in page.page.locator(".static img").all())
    assert page.page.locator("canvas").count() == 0
    assert not page.page.locator('[data-view="tree"]').is_visible()


def test_light_and_dark_have_their_own_ink(open_page: Open) -> None:
    report = marked_report(whole_run(noise(30, 6)))
    lightest, darkest = {}, {}
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        # The names beside the picture; where nothing is painted, the paper shines through.
        pixels = page.pixels("heatmap")[:, :150]
        ink = pixels[pixels[..., 3] > 200][:, :3].astype(int).sum(axis=1)
        assert ink.size > 100
        lightest[scheme], darkest[scheme] = ink.max(), ink.min()
    assert darkest["light"] < 200
    assert lightest["dark"] > 600
    assert lightest["light"] < lightest["dark"]


def test_a_change_of_the_scheme_repaints(open_page: Open) -> None:
    page = open_page(marked_report(whole_run(noise(30, 6))), color_scheme="light")
    before = page.pixels("profile")
    page.page.emulate_media(color_scheme="dark")
    page.page.wait_for_timeout(200)
    assert not np.array_equal(before, page.pixels("profile"))
