import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from functools import cache
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gradscope.analysis.finding import Evidence, Severity
from gradscope.analysis.report import Report, Skipped
from gradscope.errors import ConfigError
from gradscope.record import Entity, Run
from gradscope.reporters.html import HtmlReporter, render_side_by_side
from gradscope.reporters.html.sheets import MAX_ROWS
from tests.reporters.pages import Page
from tests.reporters.samples import (
    HOSTILE,
    META,
    empty_run,
    finding,
    parameter,
    report_of,
    run_of,
    sick_report,
    table,
)


@cache
def made(report: Report) -> str:
    """Rendering takes a second; reports compare by identity."""
    return HtmlReporter().render(report)


def embedded(report: Report) -> Any:
    """What the page's pictures are drawn from."""
    found = re.search(r'id="data">(.*?)</script>', made(report), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def page_of(report: Report) -> Page:
    return Page(made(report))


def full_run(layers: int = 4) -> Run:
    norms = np.geomspace(1e-6, 1, layers) * np.ones((30, 1))
    return run_of(norms, output_norms=norms, loss=np.linspace(2, 1, 30))


def hostile_report() -> Report:
    run = run_of(
        np.ones((3, 2)),
        names=[HOSTILE, '" onmouseover="alert(2)'],
        meta={**META, "model": HOSTILE, "device": HOSTILE, "left_out": [HOSTILE]},
    )
    evidence = (Evidence(HOSTILE, HOSTILE, 0, 2, 1.0, 2.0),)
    found = finding(
        layer=HOSTILE, message=HOSTILE, remedies=(HOSTILE, "`" + HOSTILE), evidence=evidence
    )
    under = finding("GS003", "zero-gradient", layer=HOSTILE, explained_by=("GS101",))
    note = finding("GS301", "dead-relu", Severity.INFO, HOSTILE, HOSTILE)
    return report_of(run, found, under, note, skipped=(Skipped("GS301", "x", HOSTILE),))


ALL = {
    "sick": sick_report(),
    "full": report_of(full_run(), finding()),
    "hostile": hostile_report(),
    "healthy": report_of(full_run()),
    "empty": report_of(empty_run()),
    "one step": report_of(run_of([[1.0]])),
    "all NaN": report_of(run_of(np.full((3, 3), np.nan))),
}


@pytest.mark.parametrize("report", ALL.values(), ids=ALL)
def test_the_page_asks_for_nothing(report: Report) -> None:
    page = page_of(report)
    assert "default-src 'none'" in policy_of(page)
    assert "unsafe" not in " ".join(policy_of(page))
    assert not re.search(r"https?://|@import|url\(", made(report))
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "a", "form"}
        assert "style" not in attributes
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "srcset", "href"}:
                assert value is not None
                assert value.startswith("data:image/")


def policy_of(page: Page) -> list[str]:
    contents = [
        attributes["content"]
        for attributes in page.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(contents) == 1
    return (contents[0] or "").split("; ")


@pytest.mark.parametrize(("tag", "rule"), [("script", "script-src"), ("style", "style-src")])
def test_the_policy_allows_the_pages_own_script_and_styles_alone(tag: str, rule: str) -> None:
    for report in (ALL["full"], ALL["hostile"]):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", made(report), re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy_of(page_of(report))


@pytest.mark.parametrize("report", ALL.values(), ids=ALL)
def test_pictures_are_images_with_a_description(report: Report) -> None:
    page = page_of(report)
    for attributes in page.all("img"):
        assert re.search(r"\w+ .*; .*\w", attributes["alt"] or "")
        uri = attributes["src"]
        assert uri is not None
        kind, _, content = uri.partition(";base64,")
        picture = base64.b64decode(content, validate=True)
        if kind == "data:image/png":
            assert picture.startswith(b"\x89PNG")
        else:
            assert ET.fromstring(picture).tag.endswith("svg")  # noqa: S314  (our own)


def test_hostile_names_are_text() -> None:
    page = page_of(ALL["hostile"])
    spelled_out = HOSTILE.replace("\x1b", r"\x1b")
    # Title, message, finding, remedies, evidence, consequence, note, tables, facts.
    assert page.text.count(spelled_out) > 10
    assert "\x1b" not in made(ALL["hostile"])
    # Both are the page's own.
    assert made(ALL["hostile"]).count("</script>") == 2
    assert embedded(ALL["hostile"])[0]["heatmaps"][0]["rows"][0] == f"{spelled_out}.weight"
    assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
    assert not any("onmouseover" in attributes for _, attributes in page.elements)


def test_the_verdict_comes_first_and_the_cards_say_it_all() -> None:
    page = page_of(ALL["sick"])
    order = [
        "2 root causes, training can't work: poor-initialization at layers.0; made-up.",
        "What is wrong",
        "The weights start 5 times too small.",
        "Seen in the whole run, steps 0 to 290.",
        "Call nn.init.kaiming_normal_ before training.",
        "Early layers learn nothing",
        "grad_norm first/last layer",
        "1.23e-6",
        "What it explains",
        "vanishing-gradient at layers.0",
        "zero-gradient at layers.0.weight",
        "A rule that was not asked.",
        "Also seen, without harm",
        "3 of 32 units are dead.",
        "not measured: modules.dead_unit_fraction",
        "modules that never ran: unused",
    ]
    positions = [page.text.find(said) for said in order]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert len(page.all("article")) == 2


def test_severity_is_a_word_and_a_shape() -> None:
    page = page_of(ALL["sick"])
    assert set(page.classed("severity")) == {"span"}
    assert len(page.classed("sign")) == len(page.classed("severity")) + 1
    for word in ("error", "warning", "info"):
        assert len([1 for tag in page.classed(word) if tag == "span"]) >= 1


def test_many_findings_and_layers_are_cut_and_counted() -> None:
    roots = [finding(layer=f"layers.{index}") for index in range(500)]
    under = [
        finding("GS003", "zero-gradient", layer="elsewhere", explained_by=("GS101",))
        for _ in range(30)
    ]
    page = page_of(report_of(full_run(500), *roots, *under))
    assert len(page.all("article")) == 50
    assert "And 450 more root causes" in page.text
    assert "and 10 more" in page.text
    assert len(page.classed("marked")) == 2 * MAX_ROWS
    assert f"500, {MAX_ROWS} shown" in page.text


def test_of_many_layers_the_one_with_a_finding_has_its_row() -> None:
    page = page_of(report_of(full_run(500), finding(layer="layers.444")))
    assert len(page.classed("marked")) == 2
    assert "layers.444.weight" in page.text
    assert "layers.443.weight" not in page.text


def test_the_tables_hold_the_numbers() -> None:
    page = page_of(report_of(full_run(4)))
    row = page.text.partition("layers.1.weight")[2].partition("layers.2.weight")[0].split("\n")
    assert "Linear" in row[0]
    assert "32 × 8" in row[0]
    assert "1e-4" in row[0]


def test_a_page_is_small() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 2, (2000, 40)))
    run = run_of(noise, output_norms=noise, loss=noise[:, 0])
    assert len(HtmlReporter().render(report_of(run))) < 2_500_000


def test_a_finding_has_a_picture_of_its_evidence() -> None:
    # 30 steps of 1e-6 but for one of 1e-3, which stands at the top.
    norms = np.full((30, 2), 1e-6)
    norms[20, 1] = 1e-3
    evidence = (Evidence("grad_norm", "layers.1.weight", 20, 20, 1e-3, 1e-4),)
    page = page_of(report_of(run_of(norms), finding(layer="layers.1", evidence=evidence)))
    curve = next(a["d"] for a in page.all("path") if a.get("class") == "curve")
    points = [point.split() for point in (curve or "").strip("M").split("L")]
    at_the_top = [float(x) for x, y in points if float(y) == 6]
    assert at_the_top == [pytest.approx(6 + 268 * 20 / 29, abs=0.1)]
    assert {float(y) for _, y in points} == {6.0, 78.0}
    # The limit lies two thirds up, on a logarithmic scale.
    limit = next(a["d"] for a in page.all("path") if a.get("class") == "limit")
    assert limit == "M0 30.0H280"
    shaded = next(a for a in page.all("rect") if a.get("class") == "seen")
    assert float(shaded["x"] or "nan") == pytest.approx(at_the_top[0] - 1.5, abs=0.1)


def test_findings_are_marked_in_the_pictures() -> None:
    evidence = (Evidence("grad_norm", "layers.1.weight", 5, 9, 1.0),)
    marked = finding(layer="layers.1", evidence=evidence)
    note = finding("GS301", "dead-relu", Severity.INFO, "layers.2", evidence=evidence)
    data = embedded(report_of(full_run(), marked, note))[0]
    mark = {"row": 1, "first": 5, "last": 9, "text": "GS101 vanishing-gradient"}
    assert data["heatmaps"][0]["marks"] == [mark]
    assert data["profile"]["marks"] == [mark]
    on_curves = {"first": 5, "last": 9, "text": "GS101 vanishing-gradient"}
    assert [chart["marks"] for chart in data["charts"]] == [[on_curves]] * 2
    assert [layer["severity"] for layer in data["layers"]] == [
        "healthy",
        "error",
        "info",
        "healthy",
    ]


def test_what_the_model_itself_holds_is_marked_too() -> None:
    base = full_run()
    parameters = [parameter("cls_token"), *base.parameters.entities]
    grid = np.ones((30, 5), np.float32)
    root = Entity("(root)", "module", (16, 32), 512, 0, "container", "Model")
    modules = [root, *base.modules.entities]
    run = Run(
        table("parameters", parameters, range(30), grad_norm=grid),
        table("modules", modules, range(30), output_grad_norm=grid),
        table("signals", [], range(30)),
        np.arange(30),
        {},
        META,
    )
    data = embedded(report_of(run, finding(layer="(root)")))[0]
    assert data["heatmaps"][0]["rows"][0] == "cls_token"
    assert {mark["row"] for mark in data["heatmaps"][0]["marks"]} == {0}
    health = {layer["name"]: layer["severity"] for layer in data["layers"]}
    assert health.pop("(root)") == "error"
    assert set(health.values()) == {"healthy"}


def test_a_finding_at_one_use_of_a_module_is_the_modules() -> None:
    run = run_of(np.ones((5, 3)), names=["first", "second", "second#1"])
    data = embedded(report_of(run, finding(layer="second#1")))[0]
    health = {layer["name"]: layer["severity"] for layer in data["layers"]}
    assert health == {"first": "healthy", "second": "error"}


def test_a_functional_call_is_a_part_of_its_own() -> None:
    run = run_of(np.ones((5, 3)), names=["block", "block/relu#0", "block/relu#1"])
    data = embedded(report_of(run, finding(layer="block/relu#1")))[0]
    health = {layer["name"]: layer["severity"] for layer in data["layers"]}
    assert health == {"block": "healthy", "block/relu#0": "healthy", "block/relu#1": "error"}


def test_a_finding_at_a_parameter_of_an_unwatched_module_is_in_the_tree() -> None:
    found = finding(layer="attention")
    data = embedded(report_of(full_run(), found))[0]
    assert data["layers"][-1] == {
        "name": "attention",
        "type": "",
        "value": None,
        "severity": "error",
        "codes": ["GS101"],
    }


def test_a_librarys_own_layers_are_in_the_profile() -> None:
    run = full_run()
    others = [replace(entity, group="other", type="Conv1D") for entity in run.modules.entities]
    holds_nothing = Entity("layers.9.activation", "module", (16, 32), 512, 9, "other", "Swish")
    norms = np.ones((30, 5), np.float32)
    modules = table("modules", [*others, holds_nothing], range(30), output_grad_norm=norms)
    data = embedded(report_of(replace(run, modules=modules)))[0]
    assert data["profile"]["rows"] == [f"layers.{index}" for index in range(4)]
    assert data["profile"]["table"] == "modules"


def test_what_a_broken_gradient_leaves_is_neither_a_zero_nor_in_the_median() -> None:
    norms = np.full((10, 3), 0.5)
    flags = np.zeros((10, 3))
    norms[6, :2], flags[6, :2] = 0.0, 9.0
    norms[8:], flags[8:] = 0.0, 9.0
    data = embedded(report_of(run_of(norms, nonfinite=flags)))[0]
    series = next(chart for chart in data["charts"] if chart["title"] == "Gradient norm")
    assert series["ends"] == [0, 9]
    median = series["series"][0]
    assert median["steps"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert median["broken"] == [6, 8, 9]
    # Three planes of a byte: 0.5 has the exponent 126 and no fraction.
    planes = zlib.decompress(base64.b64decode(median["values"]))
    assert planes == bytes([126] * 8 + [0] * 16)


def test_several_runs_stand_side_by_side() -> None:
    first, second = ALL["sick"], report_of(full_run())
    page = Page(render_side_by_side([first, second]))
    assert "2 runs side by side" in page.text
    assert page.text.index("Healthy: no warning, no error.") < page.text.index("What is wrong")
    # Both come from folders of the same name.
    assert "first (2)" in page.text
    assert len([a for a in page.all("div") if a.get("class") == "static"]) == 5


def test_more_runs_than_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="9 runs"):
        render_side_by_side([ALL["healthy"]] * 9)


def test_the_same_report_makes_the_same_page() -> None:
    assert HtmlReporter().render(ALL["full"]) == made(ALL["full"])


def test_a_finding_says_how_sure_it_is() -> None:
    page = made(sick_report())
    said = page.partition("<h4>How sure it is</h4>")[2].partition("</p>")[0]
    assert "<code>grad_norm</code> fades" in said
    own = HtmlReporter().render(replace(sick_report(), rules=()))
    assert "How sure it is" not in own
