"""`[tool.gradscope]`: which rules are asked, by which limits; rules of other packages."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.config import configured_rules, with_limits
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.presets import PRESETS
from gradscope.analysis.rule import rule
from gradscope.analysis.rules import BUILTIN
from gradscope.analysis.rules.vanishing_gradient import Limits as Vanishing
from gradscope.errors import ConfigError, GradscopeWarning
from gradscope.record import Run
from tests.analysis.synthetic import Chain

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a project's file; returns a folder within the project."""

    def write(text: str) -> Path:
        inner = tmp_path / "project/scripts"
        inner.mkdir(parents=True)
        (tmp_path / "project/pyproject.toml").write_text(text, encoding="utf-8")
        return inner

    return write


def codes(folder: Path) -> list[str]:
    return [rule.code for rule in configured_rules(folder)]


def limit(folder: Path, code: str, name: str) -> float:
    (found,) = (rule for rule in configured_rules(folder) if rule.code == code)
    value = getattr(found.limits, name)
    assert isinstance(value, (int, float))
    return value


def test_without_a_table_all_rules_are_asked_as_they_are(write: Write) -> None:
    folder = write("[tool.ruff]\nline-length = 100  # as gradscope\n")
    assert configured_rules(folder) == BUILTIN


def test_codes_their_beginnings_and_names(write: Write) -> None:
    folder = write('[tool.gradscope]\nselect = ["GS5", "dead-relu"]\nignore = ["GS501"]\n')
    found = codes(folder)
    assert {"GS301", "GS503"} <= set(found)
    assert found == [
        rule.code
        for rule in BUILTIN
        if rule.code == "GS301" or (rule.code[:3] == "GS5" and rule.code != "GS501")
    ]


def test_the_nearest_file_that_speaks_of_gradscope_counts(write: Write) -> None:
    folder = write('[tool.gradscope]\nselect = ["GS101"]\n')
    # A file of another tool, and one that is none but does not concern gradscope, are passed by.
    (folder / "pyproject.toml").write_text("[tool.ruff]\n[tool.ruff", encoding="utf-8")
    assert codes(folder) == ["GS101"]
    (folder / "pyproject.toml").write_text("[tool.gradscope]\n", encoding="utf-8")
    assert configured_rules(folder) == BUILTIN


def test_limits_by_code_or_name_over_those_of_a_preset(write: Write) -> None:
    folder = write(
        '[tool.gradscope]\npreset = "sagemaker"\n'
        "[tool.gradscope.limits.GS101]\ndecay = 1e-4\n"
        "[tool.gradscope.limits.update-too-large]\nonce = 3\n"
    )
    assert limit(folder, "GS101", "decay") == 1e-4
    # What isn't given stays: a gradient may be quiet in half of the steps.
    assert limit(folder, "GS101", "min_share_of_steps") == Vanishing().min_share_of_steps
    assert limit(folder, "GS401", "once") == 3
    # SageMaker Debugger's WeightUpdateRatio.
    assert limit(folder, "GS401", "extreme") == 10


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_limits_that_there_are(preset: str) -> None:
    changed = with_limits(BUILTIN, PRESETS[preset])
    assert {a.code for a, b in zip(changed, BUILTIN, strict=True) if a != b} <= set(PRESETS[preset])


def test_a_limit_of_the_file_changes_the_verdict_and_an_explicit_one_wins(write: Write) -> None:
    # Twelve layers at 0.6 each: a decay to 0.6**11 = 0.0036, which is above 1e-3.
    run = Chain(factor=0.6, loss=(2.3, 2.3)).run()
    assert "GS101" not in {finding.code for finding in analyze(run).findings}
    rules = configured_rules(write("[tool.gradscope.limits.GS101]\ndecay = 1e-2\n"))
    assert "GS101" in {finding.code for finding in analyze(run, rules).findings}
    explicit = analyze(run, rules, {"GS101": {"decay": 1e-3}})
    assert "GS101" not in {finding.code for finding in explicit.findings}


REFUSED = {
    "key": ('selct = ["GS101"]', "no 'selct'; did you mean 'select'"),
    "code": ('select = ["GS1011"]', "select names no rule by 'GS1011'; did you mean 'GS101'"),
    "name": ('ignore = ["dead-relus"]', "ignore names no rule by 'dead-relus'.*'dead-relu'"),
    "far": ('ignore = ["xyz"]', "by 'xyz'; `gradscope rules` lists them"),
    "empty": ('ignore = [""]', "ignore names no rule by ''"),
    "none": ("select = []", r"select=\[\] asks no rule"),
    "no list": ('select = "GS101"', "select='GS101' must be a list"),
    "preset": ('preset = "sagemakr"', "preset='sagemakr' is not one; did you mean 'sagemaker'"),
    "rule": ("limits.dead-rel.share = 1.0", "an unknown rule 'dead-rel'; did you mean 'dead-relu'"),
    "limit": ("limits.GS101.decayed = 1.0", "GS101 has no limit 'decayed'; did you mean 'decay'"),
    "word": ('limits.GS101.decay = "low"', "GS101: decay='low' must be a finite number"),
    "nan": ("limits.GS101.decay = nan", "GS101: decay=nan must be a finite number"),
    "flag": ("limits.GS101.decay = true", "GS101: decay=True must be of type float"),
    "share": ("limits.GS301.min_steps = 2.5", "GS301: min_steps=2.5 must be a whole number"),
    "limits": ("limits.GS101 = 3", r"limits=.* must be tables, as \[tool.gradscope.limits.GS101\]"),
    "toml": ("select = [", r"can't be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused_and_the_file_named(case: str, write: Write) -> None:
    line, words = REFUSED[case]
    folder = write(f"[tool.gradscope]\n{line}\n")
    with pytest.raises(ConfigError, match=words) as refused:
        configured_rules(folder)
    assert str(folder.parent / "pyproject.toml") in str(refused.value)


def test_a_folder_that_is_gone_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> Path:
        raise FileNotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "cwd", gone)
    assert configured_rules() == BUILTIN


# Rules of other packages.


@dataclass(frozen=True)
class Longest:
    """How long a run may be."""

    steps: int = 5


@rule("ACME1", name="long-run", limits=Longest())
def long_run(run: Run, limits: Longest) -> Iterator[Finding]:
    """Runs that are too long for us."""
    if len(run.steps) > limits.steps:
        yield long_run.finding(Severity.WARNING, None, f"{len(run.steps)} steps.")


both = [long_run]
taken = rule("GS101", name="another", limits=Longest())(long_run.check)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a package that brings rules, each line an entry point."""

    def install(points: str) -> None:
        info = tmp_path / "site/acme-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gradscope.rules]\n{points}\n")
        monkeypatch.setattr(sys, "path", [os.fspath(info.parent), *sys.path])

    return install


@pytest.mark.parametrize("of", ["long_run", "both"])
def test_rules_of_another_package_are_asked_and_tuned(
    of: str, install: Callable[[str], None], write: Write
) -> None:
    install(f"acme = {__name__}:{of}")
    folder = write("[tool.gradscope]\nselect = ['ACME']\n[tool.gradscope.limits.ACME1]\nsteps = 9")
    report = analyze(Chain(steps=10).run(), configured_rules(folder))
    assert [(f.code, f.message) for f in report.findings] == [("ACME1", "10 steps.")]
    assert report.skipped == ()
    assert not analyze(Chain(steps=9).run(), configured_rules(folder)).findings


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("no.such:rule", "ModuleNotFoundError"),
        (f"{__name__}:Longest", "Longest.* not a gradscope.Rule"),
        (f"{__name__}:taken", "the code GS101 is another rule's"),
    ],
)
def test_a_broken_package_is_named_and_costs_nothing_else(
    point: str, reason: str, install: Callable[[str], None], write: Write
) -> None:
    install(f"acme = {point}")
    # What it would have brought may be named all the same.
    folder = write('[tool.gradscope]\nignore = ["GS2", "ACME1"]\n')
    with pytest.warns(GradscopeWarning, match=f"acme of acme can't be loaded: .*{reason}") as said:
        rules = configured_rules(folder)
    assert len(said) == 1
    report = analyze(Chain().run(), rules)
    assert [(skip.code, skip.name) for skip in report.skipped if "plugin" in skip.reason] == [
        (point, "acme")
    ]
    assert {rule.code for rule in rules} > {"GS101", "GS503"}
