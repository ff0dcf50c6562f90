"""How long the HTML report of 200 layers × 2000 steps takes to make and to open, and its size.

From the root of the repository, as the browser is that of the tests: `python -m benchmarks.page`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser

from gradscope.reporters.html import HtmlReporter
from tests.viewer.browser import chromium, opened
from tests.viewer.runs import marked_report, whole_run

STEPS = 2000
LAYERS = 200
TIMES = 9


def main() -> None:
    # Noise in every digit compresses worst.
    norms = np.exp(np.random.default_rng(0).normal(0, 2, (STEPS, LAYERS)))
    report = marked_report(whole_run(norms))
    HtmlReporter().render(marked_report(whole_run(norms[:2, :2])))  # imports, and finds fonts
    start = time.perf_counter()
    page = HtmlReporter().render(report)
    rendered = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        ready, drawn = zip(*(_open(browser, path) for _ in range(TIMES)), strict=True)
    print(f"{LAYERS} layers × {STEPS} steps, {len(page.encode()) / 1e6:.2f} MB")
    print(f"render {rendered:.2f} s")
    print(f"ready {statistics.median(ready):.0f} ms ({min(ready):.0f} to {max(ready):.0f})")
    print(f"of it the page's own script {statistics.median(drawn):.0f} ms")


def _open(browser: Browser, path: Path) -> tuple[float, float]:
    """Milliseconds until the page was ready, and those its script took."""
    page = opened(browser, path)
    found = page.page.evaluate("({ ...document.documentElement.dataset })")
    page.page.context.close()
    return float(found["ready"]), float(found["drawn"])


if __name__ == "__main__":
    main()
