"""A comparison's page in the browser: it asks for nothing, can be sorted, filtered and copied."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.comparison.test_showing import EVIL, written_by_hand
from tests.viewer.browser import opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written_by_hand().write(tmp_path / "compare.html")


def test_the_page_is_quiet_and_its_names_are_text(browser: Browser, path: Path) -> None:
    made = opened(browser, path)
    assert made.complaints == []
    assert made.requests == [path.as_uri()]
    names = made.page.locator("table.sheet tbody th").all_inner_texts()
    assert f"{EVIL} + relu" in names
    made.page.context.close()


def test_a_column_sorts_and_words_filter(browser: Browser, path: Path) -> None:
    made = opened(browser, path)
    rows = made.page.locator("table.sheet tbody tr")
    made.page.locator(".gs-sort", has_text="decades").click()
    shown = rows.locator("th").all_inner_texts()
    # 15 decades, 0.1 and -3.4; what was not measured is last.
    assert [name.partition(" ")[0] for name in shown] == [
        EVIL.partition(" ")[0],
        "kaiming_normal",
        "xavier_uniform",
        "own",
    ]
    made.page.locator(".gs-filter").fill("xavier")
    assert rows.filter(visible=True).count() == 1
    made.page.context.close()


def test_a_row_lights_its_line(browser: Browser, path: Path) -> None:
    made = opened(browser, path)
    made.page.locator("table.sheet tbody tr", has_text="xavier").hover()
    lit = made.page.locator("g.lit title")
    assert lit.count() == 1
    assert (lit.text_content() or "").startswith("xavier_uniform + relu")
    made.page.context.close()


def test_code_is_copied_or_selected(browser: Browser, path: Path) -> None:
    made = opened(browser, path)
    button = made.page.locator(".copy")
    button.click()
    made.page.wait_for_function("document.querySelector('.copy').textContent != 'copy'")
    selected = made.page.evaluate("getSelection().toString()")
    assert button.inner_text() == "copied" or "a < b" in selected
    made.page.context.close()


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_the_window_with_and_without_a_script(
    browser: Browser, path: Path, *, scripts: bool, width: int
) -> None:
    made = opened(browser, path, scripts=scripts, viewport={"width": width, "height": 800})
    assert made.page.locator("table.sheet tbody tr").count() == 4
    assert made.page.locator("svg.map rect.box").count() == 5
    box = made.page.locator("main").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width
    made.page.context.close()
