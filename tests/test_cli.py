"""`gradscope report`: one run in any format, several side by side."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gradscope
from gradscope.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with gradscope.watch(model, optimizer, log_dir=folder / name):
            for _ in range(3):
                model(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()
    return [str(folder / "first"), str(folder / "second")]


def test_the_terminal_shows_each_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *runs]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{runs[0]}\n\n")
    assert f"\n\n{runs[1]}\n\n" in printed
    assert printed.count("Healthy: no warning, no error.") == 2
    assert main(["report", runs[0]]) == 0
    assert capsys.readouterr().out.startswith("Healthy: no warning, no error.")


@pytest.mark.parametrize("suffix", [".html", ".md", ".json", ".txt"])
def test_one_run_in_any_format(runs: list[str], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"new/report{suffix}"
    assert main(["report", runs[0], "-o", str(path)]) == 0
    assert "Healthy" in path.read_text(encoding="utf-8")


def test_several_runs_on_one_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.html"
    assert main(["report", *runs, "-o", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    assert "2 runs side by side" in page
    assert page.count("Healthy: no warning, no error.") == 2
    assert capsys.readouterr().out == f"{path}\n"


def test_several_runs_in_another_format_are_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.json"
    assert main(["report", *runs, "-o", str(path)]) == 2
    assert "only an HTML page holds several runs" in capsys.readouterr().err
    assert not path.exists()


def test_a_folder_without_a_run_is_an_error(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", runs[0], str(tmp_path)]) == 2
    assert "holds no gradscope run" in capsys.readouterr().err
