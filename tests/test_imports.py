"""Importing gradscope is cheap, and reading a run needs no torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gradscope

_HEAVY = ("torch", "tensorboard", "matplotlib", "pandas", "rich", "jinja2")

# Runs in a process where importing torch fails, as on a laptop without it.
_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
{code}
assert not any(name.startswith("torch.") for name in sys.modules)
"""


@pytest.fixture
def python() -> Callable[[str], str]:
    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradscope.watch(model, optimizer, log_dir=tmp_path / "run") as scope:
        for _ in range(5):
            loss = model(torch.randn(8, 3)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss)
    return tmp_path / "run"


def test_importing_gradscope_imports_nothing_heavy(python: Callable[[str], str]) -> None:
    code = f"import gradscope, sys; print([n for n in {_HEAVY} if n in sys.modules])"
    assert python(code) == "[]\n"


def test_the_block_is_a_block(python: Callable[[str], str]) -> None:
    """The meta-test: under the block, what needs torch does fail."""
    code = "try:\n    import gradscope; gradscope.watch\nexcept ImportError: print('blocked')"
    assert python(_WITHOUT_TORCH.format(code=code)) == "blocked\n"


def test_a_run_is_loaded_analyzed_and_reported_without_torch(
    python: Callable[[str], str], run_dir: Path, tmp_path: Path
) -> None:
    code = f"""
import gradscope
run = gradscope.load({str(run_dir)!r})
report = gradscope.analyze(run)
report.print()
for suffix in ("html", "json", "md", "txt"):
    report.write({str(tmp_path)!r} + "/report." + suffix)
assert "<img" in report._repr_html_() and "update_ratio" in run._repr_html_()
gradscope.figures.update_ratio(run)
print(len(run.parameters.frame()))
"""
    printed = python(_WITHOUT_TORCH.format(code=code))
    assert "Healthy" in printed
    # 5 steps × 4 parameters.
    assert printed.endswith("20\n")
    for suffix in ("html", "json", "md", "txt"):
        assert (tmp_path / f"report.{suffix}").stat().st_size > 300


def test_the_command_line_reports_without_torch(
    python: Callable[[str], str], run_dir: Path
) -> None:
    code = f"from gradscope.cli import main; assert main(['report', {str(run_dir)!r}]) == 0"
    assert "Healthy" in python(_WITHOUT_TORCH.format(code=code))


def test_the_rules_are_explained_without_torch(python: Callable[[str], str]) -> None:
    calls = "main(['explain', 'GS101']) == main(['rules']) == 0"
    code = f"from gradscope.cli import main; assert {calls}"
    assert "vanishing-gradient" in python(_WITHOUT_TORCH.format(code=code))


def test_all_public_names_can_be_had() -> None:
    assert gradscope.__all__ == sorted(gradscope.__all__)
    assert dir(gradscope) == gradscope.__all__
    for name in gradscope.__all__:
        assert getattr(gradscope, name).__name__.removeprefix("gradscope.") == name
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = gradscope.wach
