"""A page in Debian's Chromium: what it asked for, what it complained of, what can be read in it."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

# Where there is no sandbox for root, as in a container, Chromium does not start without.
_ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; without one the test fails, and says what to install."""
    wanted = os.environ.get("CHROMIUM")
    path = wanted or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("the browser tests need Chromium: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page opened from disk."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def point_at(self, view: str, x: float, y: float) -> None:
        """Move the mouse to a place of a picture, in shares of its width and height."""
        left, top, width, height = self.box(view)
        self.page.mouse.move(left + x * width, top + y * height)

    def box(self, view: str) -> tuple[float, float, float, float]:
        """Where a picture stands in the window, once it is scrolled into it."""
        canvas = self.canvas(view)
        canvas.scroll_into_view_if_needed()
        found = canvas.bounding_box()
        assert found is not None
        return found["x"], found["y"], found["width"], found["height"]

    def canvas(self, view: str) -> Any:
        return self.page.locator(f'[data-view="{view}"] canvas.gs-canvas').first

    def tooltip(self, view: str) -> str:
        """What stands beside the mouse; "" for nothing."""
        shown = self.page.locator(f'[data-view="{view}"] .gs-tooltip:not([hidden])')
        return "\n".join(shown.first.locator("div").all_inner_texts()) if shown.count() else ""

    def readout(self) -> str:
        return str(self.page.locator('[data-view="heatmap"] .gs-readout').first.inner_text())

    def pixels(self, view: str) -> Any:
        """The picture's pixels as an array of shape (height, width, 4)."""
        found = self.canvas(view).evaluate(
            """canvas => {
              const { height, width } = canvas;
              const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
              let text = "";
              for (const byte of data) text += String.fromCharCode(byte);
              return [height, width, btoa(text)];
            }"""
        )
        height, width, text = found
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)


def opened(browser: Browser, path: Path, *, scripts: bool = True, **options: Any) -> Opened:
    """Open a page from disk and wait until its pictures are drawn."""
    options.setdefault("viewport", {"width": 1100, "height": 900})
    context = browser.new_context(java_script_enabled=scripts, **options)
    page = context.new_page()
    made = Opened(page)
    page.on("request", lambda request: made.requests.append(request.url))
    page.on("console", lambda message: made.complaints.append(message.text))
    page.on("pageerror", lambda error: made.complaints.append(str(error)))
    page.on("dialog", lambda dialog: made.complaints.append(f"dialog: {dialog.message}"))
    page.goto(path.as_uri())
    if scripts and page.locator("#data").count():
        page.wait_for_selector("html[data-ready]", state="attached")
    return made
