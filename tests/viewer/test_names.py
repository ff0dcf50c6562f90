"""Names beside a picture are short, and still tell layers apart."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import gradscope

SOURCE = Path(gradscope.__file__).parent / "viewer" / "format.js"


def elided_alike(browser: Browser, names: list[str], length: int) -> list[str]:
    source = SOURCE.read_text(encoding="utf-8").replace("export ", "")
    page = browser.new_page()
    try:
        call = f"elidedAlike({json.dumps(names)}, {length})"
        shown: list[str] = page.evaluate(f"(() => {{ {source}; return {call}; }})()")
    finally:
        page.close()
    return shown


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            ["encoder.layer1.attention.weight", "encoder.layer2.output.weight"],
            ["e.l1.attention.weight", "e.l2.output.weight"],
        ),
        # T5's: with the longest as short as it must be, the others' ends would be the same.
        (
            [
                "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "block.0.layer.1.DenseReluDense.wi.weight",
                "block.0.layer.1.DenseReluDense.wo.weight",
            ],
            ["b.0.l.0.S.rab.weight", "b.0.l.1.D.wi.weight", "b.0.l.1.D.wo.weight"],
        ),
    ],
)
def test_abbreviated_alike_unless_two_become_one(
    names: list[str], wanted: list[str], browser: Browser
) -> None:
    assert elided_alike(browser, names, 24) == wanted
