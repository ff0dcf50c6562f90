import subprocess
import sys
from pathlib import Path

import pytest

import gradscope
from gradscope.errors import ConfigError
from gradscope.reporters import write_report
from tests.reporters.samples import sick_report

ROOT = Path(gradscope.__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("r.txt", "2 root causes"),
        ("R.HTML", "<!doctype html>"),
        ("r.json", '{\n  "schema_'),
        ("r.md", "## 2 root causes"),
    ],
)
def test_the_suffix_picks_the_format(tmp_path: Path, name: str, begins: str) -> None:
    path = tmp_path / "new" / "folders" / name
    sick_report().write(path)
    assert path.read_text("utf-8").startswith(begins)


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_an_unknown_suffix_names_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.html, \.json, \.md, \.txt"):
        write_report(sick_report(), tmp_path / name)


def test_a_report_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")

    def fail(*_: object) -> str:
        raise RuntimeError

    monkeypatch.setattr("gradscope.reporters.text.TextReporter.render", fail)
    with pytest.raises(RuntimeError):
        write_report(sick_report(), path)
    assert path.read_text() == "old"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_everything_works_where_torch_can_not_be_imported(tmp_path: Path) -> None:
    done = run_python(f"""
import sys
sys.modules["torch"] = None
from gradscope.reporters.tensorboard import findings_markdown
from tests.reporters.samples import sick_report
report = sick_report()
for suffix in ("txt", "json", "html"):
    report.write({str(tmp_path)!r} + "/report." + suffix)
report.print()
findings_markdown(report)
print("pyplot" if "matplotlib.pyplot" in sys.modules else "no pyplot")
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no pyplot\n")
    assert len(list(tmp_path.iterdir())) == 3


def test_importing_the_package_is_light() -> None:
    done = run_python("""
import sys
import gradscope.reporters
print(*{"matplotlib", "rich", "jinja2", "torch", "tensorboard"} & set(sys.modules))
""")
    assert done.stdout == "\n", done.stderr
