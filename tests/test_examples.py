"""The examples run, and the runs they leave hold what they promise."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradscope

_EXAMPLES = Path(__file__).parents[1] / "examples"

OutputOf = Callable[[str, Path], str]


def program_of(name: str, log_dir: Path) -> str:
    """What it prints as a program of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(_EXAMPLES / name), str(log_dir)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def output_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> OutputOf:
    """What it prints when it runs here, which saves importing torch again."""

    def run(name: str, log_dir: Path) -> str:
        path = str(_EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, str(log_dir)])
        monkeypatch.setenv("COLUMNS", "100")
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_tested() -> None:
    assert {path.name for path in _EXAMPLES.glob("*.py")} == {
        "criterion.py",
        "looking.py",
        "no_optimizer.py",
        "plain_loop.py",
    }


def test_plain_loop(tmp_path: Path) -> None:
    printed, run = program_of("plain_loop.py", tmp_path), gradscope.load(tmp_path)
    assert "Healthy" in printed
    assert list(run.recorded_steps)[:10] == list(range(10))
    # However slow the machine: the next is at most three times as far.
    assert 10 < len(run.recorded_steps) <= len(run.steps) == 100
    assert run.scalars["accuracy"][-1] > 0.8
    # What was clipped is at most 1, and the norm before is known too.
    before = run.scalars["grad_norm_before_clip"][run.recorded_steps]
    after = run.scalars["grad_norm"][run.recorded_steps]
    assert after == pytest.approx(np.minimum(before, 1), rel=1e-3)


def test_criterion(tmp_path: Path, output_of: OutputOf) -> None:
    printed, run = output_of("criterion.py", tmp_path), gradscope.load(tmp_path)
    assert "Healthy" in printed
    assert run.signals.names == ("input", "output", "target")
    assert run.scalars["loss"][-1] < run.scalars["loss"][0]
    # Half a period of a cosine, from 0.05 to 0.
    steps = np.arange(200)
    rate = 0.025 * (1 + np.cos(np.pi * steps / 200))
    assert run.scalars["learning_rate"] == pytest.approx(rate, abs=1e-9)


def test_no_optimizer(tmp_path: Path, output_of: OutputOf) -> None:
    printed, run = output_of("no_optimizer.py", tmp_path), gradscope.load(tmp_path)
    assert "Healthy" in printed
    assert len(run.recorded_steps) == 300
    # Plain descent: the update is the gradient times -0.001.
    assert run.parameters["update_gradient_cosine"] == pytest.approx(-1)
    assert run.parameters["update_norm"] == pytest.approx(
        1e-3 * run.parameters["grad_norm"], rel=1e-3
    )


def test_looking(tmp_path: Path, output_of: OutputOf) -> None:
    printed = output_of("looking.py", tmp_path)
    assert "gradscope report" in printed
    calm, wild = (gradscope.load(tmp_path / name) for name in ("0.1", "10"))
    assert calm.scalars["loss"][-10:].max() < wild.scalars["loss"][-10:].min()
    assert (tmp_path / "updates.pdf").read_bytes().startswith(b"%PDF")
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "GS401 update-too-large" in written
    # The table that it prints: the wide one, of the last recorded steps.
    last = printed.partition("\n118 ")[2].partition("\n")[0].split()
    assert [float(cell) for cell in last] == pytest.approx(
        wild.parameters["update_ratio"][-1].tolist(), rel=1e-4
    )
