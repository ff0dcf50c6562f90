"""`gradscope rules`, `gradscope explain`, and what pyproject.toml says of reports."""

import json
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import gradscope
from gradscope.analysis.analyzer import analyze
from gradscope.analysis.pages import limits
from gradscope.analysis.rule import SECTIONS, rule
from gradscope.analysis.rules import BUILTIN
from gradscope.cli import main


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the project in which the commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "pyproject.toml"


def test_all_rules_in_a_table(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    project.write_text("[tool.gradscope]\nignore = ['GS204']\n", encoding="utf-8")
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        assert len(line) <= 100
    assert [line[:5] for line in printed.splitlines() if line[:2] == "GS"] == [
        rule.code for rule in BUILTIN
    ]
    assert "GS301  dead-relu " in printed
    assert printed.count("(not asked here)") == 1


def test_all_rules_for_machines(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    project.write_text(
        "[tool.gradscope]\nselect = ['GS101']\n[tool.gradscope.limits.GS101]\ndecay = 1e-4\n",
        encoding="utf-8",
    )
    assert main(["rules", "--json"]) == 0
    listed = {entry["code"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed.keys() == {rule.code for rule in BUILTIN}
    assert listed["GS101"]["limits"]["decay"] == 1e-4
    assert [code for code, entry in listed.items() if entry["asked"]] == ["GS101"]
    assert listed["GS301"]["summary"] == "Units that are zero for every input."


@pytest.mark.parametrize("wanted", ["GS101", "vanishing-gradient"])
def test_a_rule_is_explained_with_the_projects_limits(
    wanted: str, capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    project.write_text("[tool.gradscope.limits.GS101]\ndecay = 1e-4\n", encoding="utf-8")
    assert main(["explain", wanted]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("GS101 vanishing-gradient\n")
    headings = [line for line in printed.splitlines() if line in {*SECTIONS, "Limits"}]
    assert headings == [SECTIONS[0], "Limits", *SECTIONS[1:]]
    assert "decay = 1e-4 (changed from 0.001)" in printed
    assert "AUTOTRAINER's β1 (ICSE'21), 1e-3." in printed


def test_every_rule_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for known in BUILTIN:
        assert main(["explain", known.code]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        # The last words of the page, which are plain.
        assert printed.rstrip(".").endswith(
            known.section("References").replace("`", "").rstrip(".").split()[-1]
        )
        assert all(f"{limit.name} = " in printed for limit in limits(known))


def test_an_unknown_rule_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "vanishing"]) == 2
    assert "did you mean 'vanishing-gradient'?" in capsys.readouterr().err


def test_a_mistake_in_the_projects_file_is_named(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    project.write_text("[tool.gradscope]\nignroe = []\n", encoding="utf-8")
    assert main(["rules"]) == 2
    said = capsys.readouterr().err
    assert str(project) in said
    assert "did you mean 'ignore'?" in said


@dataclass(frozen=True)
class Noted:
    """With: a colon."""

    # Two lines
    # of reason.
    above: float = 1.0
    behind: int = 2  # Here: the reason.

    # Of nothing.

    # One paragraph, the next.
    split: dict[str, int] | None = None
    bare: str = "a: b"


def test_the_reasons_of_limits_are_the_comments_beside_them() -> None:
    known = limits(rule("X1", name="x", limits=Noted())(lambda *_: iter(())))
    assert [(limit.name, limit.reason) for limit in known] == [
        ("above", "Two lines of reason."),
        ("behind", "Here: the reason."),
        ("split", "Of nothing. One paragraph, the next."),
        ("bare", ""),
    ]


def test_limits_without_a_source_have_no_reasons() -> None:
    made = make_dataclass("made", [("share", float, 0.5)], frozen=True)
    (known,) = limits(rule("X1", name="x", limits=made())(lambda *_: iter(())))
    assert (known.name, known.value, known.reason) == ("share", 0.5, "")


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    """The run of a model of which the optimizer holds one layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.01)
    with gradscope.watch(model, optimizer, log_dir=tmp_path / "run"):
        for _ in range(5):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            model.zero_grad()
    return tmp_path / "run"


def test_the_exit_status_tells_what_was_found(
    sick: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worst = max(finding.severity for finding in analyze(gradscope.load(sick)).findings)
    assert worst is gradscope.Severity.WARNING
    run = str(sick)
    assert main(["report", run]) == 0
    assert main(["report", run, "--fail-on", "error"]) == 0
    assert main(["report", run, "--fail-on", "warning"]) == 1
    assert "not-in-optimizer" in capsys.readouterr().out
    # What the project does not ask for isn't found.
    project.write_text("[tool.gradscope]\nignore = ['not-in-optimizer']\n", encoding="utf-8")
    assert main(["report", run, "--fail-on", "warning"]) == 0
    assert "not-in-optimizer" not in capsys.readouterr().out
