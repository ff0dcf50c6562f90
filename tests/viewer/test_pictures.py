"""The viewer's pictures: what they show is what was measured, at that place."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.analysis.words import number
from gradscope.record import Run, pack_counts
from tests.reporters.samples import report_of, run_of
from tests.viewer.browser import Opened
from tests.viewer.runs import marked_report, noise, whole_run

Open = Callable[..., Opened]
VIEWER = Path(gradscope.__file__).parent / "viewer"


def read(told: str) -> tuple[str, int, str]:
    """Layer, step and number of a tooltip."""
    name, said = told.split("\n")[:2]
    found = re.fullmatch(r"step (\d+): ‖g‖ = (.+)", said)
    assert found is not None, said
    return name, int(found[1]), found[2]


def test_hover_shows_the_number_of_the_run_at_that_place(open_page: Open) -> None:
    run = whole_run(noise(60, 12))
    page = open_page(report_of(run))
    norms, names = run.parameters["grad_norm"], run.parameters.names
    seen = set()
    for x in np.linspace(0.25, 0.95, 9):
        for y in np.linspace(0.15, 0.8, 7):
            page.point_at("heatmap", float(x), float(y))
            name, step, said = read(page.tooltip("heatmap"))
            value = float(norms[step, names.index(name)])
            # Three digits of a number that was kept to eleven bits.
            assert float(said) == pytest.approx(value, rel=6e-3)
            seen.add((name, step))
    assert len(seen) == 63


def test_places_are_rows_by_depth_and_steps_in_time(open_page: Open) -> None:
    run = whole_run(noise(50, 10))
    page = open_page(report_of(run))
    left, top, width, height = page.box("heatmap")
    corners = {}
    # The plot ends 10 pixels from the right and 40 from the foot, and begins 22 from the top.
    for name, x, y in (
        ("top right", width - 12, 24),
        ("bottom right", width - 12, height - 42),
    ):
        page.page.mouse.move(left + x, top + y)
        corners[name] = read(page.tooltip("heatmap"))[:2]
    assert corners == {
        "top right": (run.parameters.names[0], 49),
        "bottom right": (run.parameters.names[-1], 49),
    }


def yellow(page: Opened) -> int:
    """How many pixels have the colour of the scale's upper end."""
    pixels = page.pixels("heatmap").astype(int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return int(((red > 235) & (green > 215) & (blue < 80)).sum())


def test_a_one_step_spike_among_2000_is_seen_at_800_pixels(open_page: Open) -> None:
    norms = np.exp(np.random.default_rng(1).normal(-5, 0.1, (2000, 100)))
    narrow = {"width": 800, "height": 700}
    calm = open_page(report_of(whole_run(norms.copy())), viewport=narrow)
    spikes = {0: 20, 777: 40, 1999: 60}
    for at, row in spikes.items():
        norms[at, row] = 100.0
    run = whole_run(norms)
    spiky = open_page(report_of(run), viewport=narrow)
    # Beside the noise nothing has the uppermost colour but a speck of some pixels each.
    assert yellow(spiky) >= 27
    assert yellow(calm) < 1000
    left, top, width, height = spiky.box("heatmap")
    gutter = min(0.34 * width, 7 * len("stage10.layer40.weight") + 24)
    for at, row in spikes.items():
        told = set()
        x = left + gutter + (width - gutter - 10) * (at + 0.5) / 2000
        y = top + 22 + (height - 62) * (row + 0.5) / 100
        for shift in (-2, -1, 0, 1, 2):
            spiky.page.mouse.move(x + shift, y)
            told.add(spiky.tooltip("heatmap"))
        assert f"{run.parameters.names[row]}\nstep {at}: ‖g‖ = 100" in told


@pytest.mark.parametrize(("event", "mark"), [(0.0, (0, 0, 0)), (np.nan, (213, 94, 0))])
def test_zero_and_non_finite_have_marks_of_their_own(
    open_page: Open, event: float, mark: tuple[int, int, int]
) -> None:
    norms = noise(2000, 100)
    norms[900, 50] = event
    flags = np.isnan(norms).astype(float)
    page = open_page(report_of(whole_run(norms, nonfinite=flags)), color_scheme="light")
    pixels = page.pixels("heatmap")[..., :3]
    # A square of ten pixels with a sign in it.
    assert (pixels == mark).all(axis=-1).sum() > 40
    legend = page.page.locator('[data-view="heatmap"] .gs-legend').inner_text()
    assert ("exactly zero" in legend) == (event == 0)
    assert ("NaN or infinite" in legend) == np.isnan(event)


def test_what_was_not_recorded_is_no_number(open_page: Open) -> None:
    # Recorded densely, then a long pause.
    steps = [*range(20), *range(500, 520)]
    page = open_page(report_of(run_of(noise(40, 6), steps=steps)))
    page.point_at("heatmap", 0.6, 0.4)
    assert page.tooltip("heatmap") == ""
    page.point_at("heatmap", 0.985, 0.4)
    assert read(page.tooltip("heatmap"))[1] >= 500


def test_the_keyboard_reads_every_cell(open_page: Open) -> None:
    run = whole_run(noise(5, 3))
    page = open_page(report_of(run))
    page.canvas("heatmap").focus()
    keys = ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft"]
    expected = [(0, 0), (0, 1), (1, 1), (2, 1), (2, 1), (2, 0)]
    for key, (row, step) in zip(keys, expected, strict=True):
        page.page.keyboard.press(key)
        assert page.readout().startswith(f"{run.parameters.names[row]} · step {step}: ‖g‖ = ")


def test_dragging_zooms_and_a_double_click_shows_all(open_page: Open) -> None:
    page = open_page(report_of(whole_run(noise(1000, 40))))
    left, top, width, height = page.box("heatmap")

    def steps_shown() -> int:
        found = set()
        for x in (0.4, 0.98):
            page.point_at("heatmap", x, 0.5)
            found.add(read(page.tooltip("heatmap"))[1])
        return max(found) - min(found)

    whole = steps_shown()
    page.page.mouse.move(left + 0.5 * width, top + 0.4 * height)
    page.page.mouse.down()
    page.page.mouse.move(left + 0.6 * width, top + 0.42 * height, steps=4)
    page.page.mouse.up()
    assert 0 < steps_shown() < whole / 5
    page.page.mouse.dblclick(left + 0.5 * width, top + 0.5 * height)
    assert steps_shown() == whole
    page.canvas("heatmap").focus()
    page.page.keyboard.press("+")
    assert steps_shown() < whole


def test_marks_of_findings_are_told(open_page: Open) -> None:
    run = whole_run(noise(40, 6))
    page = open_page(marked_report(run, row=1))
    # Its row is the second of six; seen from step 10 to 20 of 40.
    told = {}
    for x in (0.5, 0.95):
        page.point_at("heatmap", x, 0.3)
        told[x] = page.tooltip("heatmap")
    assert "GS101 vanishing-gradient" in told[0.5]
    assert "GS101 vanishing-gradient" not in told[0.95]


def test_another_quantity_can_be_chosen(open_page: Open) -> None:
    run = whole_run(noise(30, 6))
    page = open_page(report_of(run))
    choice = page.page.locator("#quantity")
    assert choice.locator("option").all_inner_texts() == [
        "gradient norm",
        "gradient norm at outputs",
        "update ratio",
        "dead units",
    ]
    choice.select_option("dead units")
    page.page.wait_for_timeout(100)
    page.canvas("heatmap").focus()
    page.page.keyboard.press("ArrowRight")
    for _ in range(15):
        page.page.keyboard.press("ArrowRight")
    share = float(run.modules["dead_unit_fraction"][15, 0])
    assert page.readout() == f"{run.modules.names[0]} · step 15: dead = {number(100 * share)}%"


def test_the_slider_moves_the_profile(open_page: Open) -> None:
    run = whole_run(noise(30, 6))
    page = open_page(report_of(run))
    slider = page.page.locator('[data-view="profile"] input')
    for step in (29, 7):
        slider.evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }",
            step,
        )
        page.point_at("profile", 0.95, 0.4)
        name, said, median = page.tooltip("profile").split("\n")
        row = run.modules.names.index(name)
        norms = run.modules["output_grad_norm"][:, row].astype(float)
        assert said.startswith(f"step {step}: ")
        assert float(said.partition(": ")[2]) == pytest.approx(norms[step], rel=6e-3)
        assert float(median.partition(": ")[2]) == pytest.approx(np.median(norms), rel=6e-3)


def test_curves_tell_their_numbers(open_page: Open) -> None:
    run = whole_run(noise(30, 6))
    page = open_page(report_of(run))
    page.point_at("lines", 0.6, 0.5)
    step_said, loss_said = page.tooltip("lines").split("\n")[:2]
    step = int(step_said.removeprefix("step "))
    assert float(loss_said.removeprefix("loss: ")) == pytest.approx(
        run.scalars["loss"][step], rel=6e-3
    )


def test_ridges_tell_shares_of_the_entries(open_page: Open) -> None:
    page = open_page(report_of(whole_run(noise(10, 6))))
    left, top, width, height = page.box("ridgelines")
    told = set()
    for x in np.linspace(0.2, 0.98, 120):
        page.page.mouse.move(left + float(x) * width, top + 0.5 * height)
        told.add(page.tooltip("ridgelines").partition("\n")[2])
    # 100 of 150 entries in an octave, 50 in the next; kept as roots in a byte.
    shares = {float(said.partition(": ")[2].partition("%")[0]) for said in told if ": " in said}
    assert sorted(shares) == [0.0, pytest.approx(33.3, abs=0.6), pytest.approx(66.7, abs=0.6)]
    assert any(said.startswith(f"{number(2.0**-32)} to ") for said in told)


def test_ridges_tell_what_was_not_measured_from_what_is_zero(open_page: Open) -> None:
    steps, layers = 10, 6
    norms, nonfinite = noise(steps, layers), np.zeros((steps, layers))
    # At the last step: two not read, two of zeros, one that was read and not counted.
    norms[-1], nonfinite[-1] = [np.nan, np.nan, 0, 0, 0.1, 0.1], [np.nan, np.nan, 0, 0, 0, 0]
    run = whole_run(norms, nonfinite=nonfinite)
    counts = run.histograms.at(0)
    counts[:5] = 0
    run = replace(
        run,
        histograms=replace(
            run.histograms, packed=(*run.histograms.packed[:-1], pack_counts(counts))
        ),
    )
    page = open_page(report_of(run))
    left, top, width, height = page.box("ridgelines")
    told = {}
    for y in np.linspace(0.02, 0.98, 200):
        page.page.mouse.move(left + 0.6 * width, top + float(y) * height)
        if said := page.tooltip("ridgelines"):
            name, _, rest = said.partition("\n")
            told[int(name.removesuffix(".weight")[-1])] = rest
    nothing, zero = "not measured", "no finite entry other than zero"
    assert [told[layer] for layer in range(5)] == [nothing, nothing, zero, zero, nothing]
    assert "of the entries" in told[5]


def test_ridges_are_shown_of_all_that_was_counted(open_page: Open) -> None:
    run = whole_run(noise(10, 6))
    # Eight octaves higher than the gradients.
    outputs = replace(
        run.histograms, entities=run.modules.entities, lowest=run.histograms.lowest + 8
    )
    page = open_page(report_of(replace(run, deep={"output": outputs})))
    choice = page.page.locator("#counted")
    assert choice.locator("option").all_inner_texts() == ["gradients", "outputs"]
    choice.select_option("outputs")
    assert page.page.locator('[data-view="ridgelines"] canvas.gs-canvas').count() == 1
    left, top, width, height = page.box("ridgelines")
    told = set()
    for x in np.linspace(0.2, 0.98, 120):
        page.page.mouse.move(left + float(x) * width, top + 0.5 * height)
        told.add(page.tooltip("ridgelines").partition("\n")[2])
    assert any(said.startswith(f"{number(2.0**-24)} to ") for said in told)
    assert page.complaints == []


def test_the_tree_has_the_health_of_each_part(open_page: Open) -> None:
    run = whole_run(noise(30, 8))
    page = open_page(marked_report(run, row=5))
    tree = page.page.locator('[data-view="tree"]')
    states = {
        node.locator(".gs-name").text_content(): node.locator(".gs-health").get_attribute(
            "aria-label"
        )
        for node in tree.locator(".gs-node").all()
    }
    assert states == {
        "stage0": "healthy",
        "stage1": "error",
        **{f"layer{index}": "error" if index == 5 else "healthy" for index in range(8)},
    }
    tree.locator("button", has_text="layer6").click()
    assert page.readout().startswith("stage1.layer6.weight · ")


def test_rows_can_be_sorted_and_filtered(open_page: Open) -> None:
    run = whole_run(noise(30, 12))
    page = open_page(report_of(run))
    sheet = page.page.locator("details:has(table)").first
    names = sheet.locator("tbody th")
    sheet.get_by_role("button", name="gradient norm, last").click()
    last = run.parameters["grad_norm"][-1]
    expected = [run.parameters.names[row] for row in np.argsort(-last)]
    assert names.all_inner_texts() == expected
    sheet.get_by_role("button", name="gradient norm, last").click()
    assert names.all_inner_texts() == expected[::-1]
    sheet.locator("input").fill("layer1")
    shown = [name.inner_text() for name in names.all() if name.is_visible()]
    assert sorted(shown) == sorted(name for name in run.parameters.names if "layer1" in name)


def test_runs_beside_one_another_share_their_scale(open_page: Open) -> None:
    calm, loud = noise(30, 6), noise(30, 6) * 1e6
    page = open_page(report_of(whole_run(calm)), report_of(whole_run(loud, folder="second")))
    legends = page.page.locator('[data-view="heatmap"] .gs-ticks').all_inner_texts()
    assert len(legends) == 2
    assert legends[0] == legends[1]


def test_the_viewer_knows_nothing_of_the_page() -> None:
    for path in VIEWER.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        for forbidden in (
            "querySelector",
            "getElementById",
            "innerHTML",
            "fetch(",
            "http",
            "eval(",
        ):
            assert forbidden not in source, (path.name, forbidden)
        for imported in re.findall(r'from "([^"]+)"', source):
            assert imported.startswith("./")
            assert (VIEWER / imported).is_file()
        assert len(source.splitlines()) <= 400


def test_a_run_can_hold_more_layers_than_are_shown(open_page: Open) -> None:
    run: Run = whole_run(noise(3, 2500))
    page = open_page(marked_report(run, row=1777))
    assert page.complaints == []
    note = page.page.locator("#quantity-note").inner_text()
    found = re.search(r"([\d,]+) of 2500 parameters are left out", note)
    assert found is not None
    assert int(found[1]) >= 1500
    page.page.locator('[data-view="tree"] button', has_text="layer1777").click()
    assert page.readout().startswith(f"{run.parameters.names[1777]} · ")
