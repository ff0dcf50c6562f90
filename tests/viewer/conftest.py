from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from gradscope.analysis.report import Report
from gradscope.reporters.html import render_side_by_side
from tests.viewer.browser import Opened, chromium, opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Write the reports as one page, and open it."""
    made: list[Opened] = []

    def open_(*reports: Report, **options: object) -> Opened:
        path = tmp_path / f"{len(made)}.html"
        path.write_text(render_side_by_side(reports), encoding="utf-8")
        made.append(opened(browser, path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield open_
    for page in made:
        page.page.context.close()
