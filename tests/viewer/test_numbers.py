"""Colours, bands and scales against an independent computation from the run."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.record import Run
from tests.reporters.samples import finding, report_of, run_of
from tests.viewer.browser import Opened
from tests.viewer.runs import marked_report, noise, whole_run

Open = Callable[..., Opened]
# Where the heatmap's plot begins and ends, in CSS pixels.
TOP, BOTTOM, RIGHT = 22, 40, 10


def plot_of(page: Opened, run: Run) -> tuple[float, float, float, float]:
    """Left, top, width and height of the heatmap's plot within its canvas."""
    _, _, width, height = page.box("heatmap")
    gutter = min(0.34 * width, 7 * max(map(len, run.parameters.names)) + 24)
    return gutter, TOP, width - gutter - RIGHT, height - TOP - BOTTOM


def expected(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Viridis of the logarithm between the lowest and the highest; red, green, blue."""
    logs = np.log10(norms)
    shares = (logs - logs.min()) / (logs.max() - logs.min())
    return np.asarray(mpl.colormaps["viridis"](shares)[..., :3] * 255)


Painted = Callable[[float, float], NDArray[np.int64]]


def painted(page: Opened, ratio: float) -> Painted:
    """The colour at each place of the heatmap, in CSS pixels of its canvas."""
    pixels = page.pixels("heatmap").astype(int)
    return lambda x, y: np.asarray(pixels[int(y * ratio), int(x * ratio), :3])


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_cell_has_the_colour_of_its_number(open_page: Open, ratio: int) -> None:
    # Cells of some thirty pixels, from 1e-3 to 1 in no order.
    norms = 10 ** np.random.default_rng(5).uniform(-3, 0, (20, 8))
    run = whole_run(norms)
    page = open_page(report_of(run), device_scale_factor=ratio)
    left, top, width, height = plot_of(page, run)
    colours = expected(run.parameters["grad_norm"].astype(np.float64))
    colour_at = painted(page, ratio)
    for step in range(20):
        for layer in range(8):
            x = left + width * (step + 0.5) / 20
            y = top + height * (layer + 0.5) / 8
            # 256 colours, of which every fourth is exact.
            assert np.abs(colour_at(x, y) - colours[step, layer]).max() <= 4, (step, layer)


def test_a_closer_look_has_the_same_colours_and_numbers(open_page: Open) -> None:
    norms = 10 ** np.random.default_rng(6).uniform(-3, 0, (200, 30))
    run = whole_run(norms)
    page = open_page(report_of(run), device_scale_factor=2)
    left, top, width, height = plot_of(page, run)
    x0, y0, _, _ = page.box("heatmap")
    # From step 100 to 110 and from row 10 to 15.
    page.page.mouse.move(x0 + left + width * 100 / 200, y0 + top + height * 10 / 30)
    page.page.mouse.down()
    page.page.mouse.move(x0 + left + width * 110 / 200, y0 + top + height * 15 / 30, steps=3)
    page.page.mouse.up()
    page.page.mouse.move(0, 0)
    page.page.wait_for_timeout(100)
    colours = expected(run.parameters["grad_norm"].astype(np.float64))
    colour_at = painted(page, 2)
    for step, layer in ((101, 11), (105, 12), (108, 14)):
        x = left + width * (step + 0.5 - 100) / 10
        y = top + height * (layer + 0.5 - 10) / 5
        assert np.abs(colour_at(x, y) - colours[step, layer]).max() <= 4
        page.page.mouse.move(x0 + x, y0 + y)
        name, said = page.tooltip("heatmap").split("\n")
        assert name == run.parameters.names[layer]
        assert said.startswith(f"step {step}: ")
        assert float(said.partition("= ")[2]) == pytest.approx(norms[step, layer], rel=6e-3)


def test_what_lies_at_the_edges_is_told(open_page: Open) -> None:
    run = whole_run(noise(37, 9))
    page = open_page(report_of(run), device_scale_factor=2)
    left, top, width, height = plot_of(page, run)
    x0, y0, _, _ = page.box("heatmap")
    corners = {
        (0, 0): (left + 0.6, top + 0.6),
        (36, 8): (left + width - 0.6, top + height - 0.6),
    }
    for (step, layer), (x, y) in corners.items():
        page.page.mouse.move(x0 + x, y0 + y)
        assert page.tooltip("heatmap").startswith(f"{run.parameters.names[layer]}\nstep {step}: ")
    for x, y in ((left - 2, top + 5), (left + width + 2, top + 5), (left + 5, top + height + 2)):
        page.page.mouse.move(x0 + x, y0 + y)
        assert page.tooltip("heatmap") == ""


def test_cells_of_uneven_steps_lie_where_they_were_recorded(open_page: Open) -> None:
    # Every 10th step, then after a pause of 400 every 10th again.
    steps = [*range(0, 100, 10), *range(500, 600, 10)]
    run = run_of(noise(20, 4), steps=steps)
    page = open_page(report_of(run))
    left, top, width, _ = plot_of(page, run)
    x0, y0, _, _ = page.box("heatmap")
    told = {}
    for step in (3, 47, 96, 107, 300, 503, 596):
        # The last one is drawn as wide as the others: the picture ends at 600.
        page.page.mouse.move(x0 + left + width * (step + 0.5) / 600, y0 + top + 5)
        said = page.tooltip("heatmap").partition("\n")[2]
        told[step] = said.partition(":")[0]
    assert told == {
        3: "step 0",
        47: "step 40",
        96: "step 90",
        107: "",
        300: "",
        503: "step 500",
        596: "step 590",
    }


def test_the_profile_tells_the_median_of_all_steps_also_where_columns_hold_extremes(
    open_page: Open,
) -> None:
    # So many cells that the profile's columns hold several steps each.
    random = np.random.default_rng(7)
    norms = 10 ** np.where(random.random((900, 120)) < 0.1, 2, random.normal(-2, 0.2, (900, 120)))
    run = whole_run(norms)
    page = open_page(report_of(run))
    page.point_at("profile", 0.5, 0.3)
    name, said, median = page.tooltip("profile").split("\n")
    assert said.startswith("steps ")
    assert "farthest from the median" in said
    truth = np.median(norms[:, run.modules.names.index(name)])
    assert float(median.partition(": ")[2]) == pytest.approx(truth, rel=6e-3)


def ticks(page: Opened, run: int) -> list[str]:
    """What the vertical axis of a run's gradient norms says, read from how it is drawn."""
    told = page.page.evaluate(
        """async index => {
          const written = [];
          const canvas = document.querySelectorAll('[data-view="lines"] canvas.gs-canvas')[index];
          const context = canvas.getContext("2d");
          const write = context.fillText.bind(context);
          context.fillText = (text, ...more) => { written.push(text); write(text, ...more); };
          window.dispatchEvent(new Event("gradscope:theme"));
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          return written;
        }""",
        run,
    )
    return [text for text in told if text.startswith("10")]


def test_curves_of_several_runs_share_their_scale(open_page: Open) -> None:
    calm, loud = noise(30, 6), noise(30, 6) * 1e6
    page = open_page(report_of(whole_run(calm)), report_of(whole_run(loud, folder="second")))
    titles = page.page.locator('[data-view="lines"] .run-name').all_inner_texts()
    at = [index for index, title in enumerate(titles) if title.startswith("Gradient norm")]
    first, second = (ticks(page, index) for index in at)
    assert first == second
    assert len(first) >= 3


def test_panels_of_several_runs_stand_at_one_height(open_page: Open) -> None:
    # One of them has marks, and so a longer legend.
    page = open_page(
        report_of(whole_run(noise(30, 6))), marked_report(whole_run(noise(30, 6), folder="second"))
    )
    for view in ("profile", "heatmap", "ridgelines"):
        boxes = [
            c.bounding_box()
            for c in page.page.locator(f'[data-view="{view}"] canvas.gs-canvas').all()
        ]
        assert len({round(box["y"]) for box in boxes if box}) == 1, view
        assert len(boxes) == 2


def test_a_gradient_that_is_nan_is_no_zero_in_the_curves(open_page: Open) -> None:
    norms = noise(30, 5)
    flags = np.zeros((30, 5))
    # What is finite of a broken gradient can be zero.
    norms[20:], flags[20:] = 0.0, 3.0
    page = open_page(report_of(whole_run(norms, nonfinite=flags)))
    panel = page.page.locator('[data-view="lines"] .panel', has_text="Gradient norm")
    legend = panel.locator(".gs-legend").inner_text()
    assert "NaN or infinite" in legend
    assert "exactly zero" not in legend
    panel.locator("canvas").scroll_into_view_if_needed()
    box = panel.locator("canvas").bounding_box()
    assert box is not None
    page.page.mouse.move(box["x"] + box["width"] - 13, box["y"] + 60)
    told = panel.locator(".gs-tooltip").inner_text()
    assert told == "step 29\nmedian layer: NaN or infinite"


def test_a_tooltip_stays_inside_its_picture(open_page: Open) -> None:
    names = [f"encoder.{'x' * 200}.{index}" for index in range(8)]
    page = open_page(
        report_of(whole_run(noise(30, 8), names=names)), viewport={"width": 390, "height": 800}
    )
    for view in ("heatmap", "profile", "lines", "ridgelines"):
        for x in (0.45, 0.7, 0.94):
            page.point_at(view, x, 0.4)
            frame = page.page.locator(f'[data-view="{view}"] .gs-surface').first.bounding_box()
            tip = page.page.locator(f'[data-view="{view}"] .gs-tooltip').first.bounding_box()
            assert frame is not None
            assert tip is not None
            assert tip["x"] >= frame["x"] - 1
            assert tip["x"] + tip["width"] <= frame["x"] + frame["width"] + 1
    over = page.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert over <= 0


def test_names_stay_apart_where_there_is_little_room(open_page: Open) -> None:
    names = [
        f"layer{stage}.{block}.conv{unit}"
        for stage in (1, 2)
        for block in (0, 1)
        for unit in (1, 2)
    ]
    page = open_page(
        report_of(whole_run(noise(30, 8), names=names)), viewport={"width": 390, "height": 800}
    )
    written = page.page.evaluate(
        """async () => {
          const written = [];
          const canvas = document.querySelector('[data-view="heatmap"] canvas.gs-canvas');
          const context = canvas.getContext("2d");
          context.fillText = (text) => written.push(text);
          window.dispatchEvent(new Event("gradscope:theme"));
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          return written;
        }"""
    )
    short = [text for text in written if text.startswith("l")]
    assert len(set(short)) == 8
    assert all(len(text) <= 14 for text in short)


ODD = ["", "a" * 300, "🙂.🙃" * 8, "\u202eevil.weight", "__proto__", "block#1", "..", "toString"]


def test_odd_names_are_drawn_and_told(open_page: Open) -> None:
    run = whole_run(noise(20, len(ODD)), names=ODD)
    page = open_page(report_of(run, *(finding(layer=name) for name in ODD)))
    assert page.complaints == []
    told = []
    page.canvas("heatmap").focus()
    page.page.keyboard.press("ArrowRight")
    for _ in ODD:
        told.append(page.readout().partition(" · step")[0])
        page.page.keyboard.press("ArrowDown")
    assert told == [f"{name}.weight".replace("\u202e", r"\u202e") for name in ODD]
    assert page.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
