"""`gradscope compare` on the command line."""

import json
from pathlib import Path

import pytest

from gradscope.cli import main

_MODULE = """
import torch
from torch import nn

def make_model():
    hidden = [m for _ in range(6) for m in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(8, 3))

def make_batch():
    return torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_of_the_test.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_compares_prints_and_writes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        [
            "compare",
            "nets_of_the_test:make_model",
            "--data=nets_of_the_test:make_batch",
            "--loss=torch.nn:CrossEntropyLoss",
            "--initializations=kaiming_normal, xavier_uniform",
            "--activations=own",
            "--seeds=2",
            "--log-dir=log",
            "-o=compare.html",
        ]
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "kaiming_normal + own" in printed
    assert "compare.html" in printed
    assert (place / "compare.html").read_text().startswith("<!doctype html>")
    _, *cells = (place / "log/cells.jsonl").read_text().splitlines()
    assert len({tuple(json.loads(cell)["name"]) for cell in cells}) == 2
    assert len(cells) == 4


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nets_of_the_test", "must be package.module:name"),
        ("nets_of_the_test:nothing", "can't be found"),
        ("no_such_module:make", "can't be found"),
    ],
)
def test_what_is_not_there_is_said(
    model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", model, "--data=nets_of_the_test:make_batch"]) == 2
    assert words in capsys.readouterr().err
