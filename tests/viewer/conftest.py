from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from gradscope.analysis.report import Report
from gradscope.reporters import html
from tests.viewer.browser import Opened, chromium, opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Opened]]:
    """Write the reports as one page, and open it.

    static: with the pictures for print, which take longer than all else.
    """
    made: list[Opened] = []

    def open_(*reports: Report, static: bool = False, **options: object) -> Opened:
        path = tmp_path / f"{len(made)}.html"
        with monkeypatch.context() as patch:
            if not static:
                patch.setattr(html, "pictures", lambda _: {})
            path.write_text(html.render_side_by_side(reports), encoding="utf-8")
        made.append(opened(browser, path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield open_
    for page in made:
        page.page.context.close()
