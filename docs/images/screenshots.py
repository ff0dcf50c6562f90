"""The README's pictures of a report: `python -m docs.images.screenshots` in the root."""

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import FloatRect

from gradscope.demo import run_demo
from tests.viewer.browser import chromium, opened

_WIDTH, _BELOW = 1080, 8
# A palette takes a third of the bytes.
_COLORS = 96


def main() -> None:
    """Take the top of the first demo's report, down to the gradient by depth, light and dark."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        run_demo(Path(folder) / "demo")
        for scheme in ("light", "dark"):
            report = opened(
                browser,
                Path(folder) / "demo/sigmoid.html",
                viewport={"width": _WIDTH, "height": 1500},
                device_scale_factor=1.5,
                color_scheme=scheme,
            )
            foot: float = report.page.evaluate(
                "document.querySelector('[data-view=profile]').getBoundingClientRect().bottom"
            )
            clip: FloatRect = {"x": 0, "y": 0, "width": _WIDTH, "height": foot + _BELOW}
            taken = report.page.screenshot(full_page=True, clip=clip)
            whole = Image.open(io.BytesIO(taken)).convert("RGB")
            small = whole.quantize(_COLORS, dither=Image.Dither.NONE)
            small.save(Path(__file__).with_name(f"report-{scheme}.png"), optimize=True)


if __name__ == "__main__":
    main()
