"""Asking the rules: order, causes, limits, and rules that fail."""

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace

import pytest

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.causes import EXPLAINS, arrange
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.rule import SECTIONS, Rule, rule
from gradscope.analysis.rules import BUILTIN
from gradscope.errors import ConfigError, ConfigTypeError
from gradscope.record import Run
from tests.analysis.synthetic import Chain


@dataclass(frozen=True)
class NoLimits:
    """Nothing to choose."""


def failing(run: Run, limits: NoLimits) -> Iterator[Finding]:
    """Yield one finding, then fail."""
    del limits
    yield Finding("GS998", "failing", Severity.ERROR, None, f"{len(run.steps)} steps")
    raise ZeroDivisionError


def test_a_rule_that_fails_costs_only_itself() -> None:
    bad = rule("GS998", name="failing", limits=NoLimits())(failing)
    report = analyze(Chain().run(), rules=[bad, *BUILTIN])
    assert report.findings == ()
    failed = [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert [(skip.code, skip.reason) for skip in failed] == [
        ("GS998", "failed: ZeroDivisionError: ")
    ]


def test_only_the_rules_that_were_asked_for() -> None:
    report = analyze(Chain().run(), rules=BUILTIN[:2])
    assert [rule.code for rule in report.rules] == ["GS001", "GS002"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"GS1011": {}}, "did you mean 'GS101'"),
        ({"GS101": {"decayed": 1.0}}, "did you mean 'decay'"),
    ],
)
def test_unknown_limits_name_the_nearest(limits: dict[str, dict[str, float]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        analyze(Chain().run(), limits=limits)


def test_limits_must_be_a_dataclass() -> None:
    with pytest.raises(ConfigTypeError, match="GS997"):
        rule("GS997", name="x", limits={"a": 1})


def finding(code: str, severity: Severity, layer: str | None = None) -> Finding:
    return Finding(code, code.lower(), severity, layer, "…")


def test_root_causes_come_first_then_by_severity() -> None:
    given = [
        finding("GS503", Severity.ERROR),
        finding("GS002", Severity.INFO),
        finding("GS102", Severity.ERROR),
        finding("GS104", Severity.WARNING),
    ]
    arranged = arrange(given)
    assert [f.code for f in arranged] == ["GS104", "GS002", "GS102", "GS503"]
    assert [f.explained_by for f in arranged] == [(), (), ("GS104",), ("GS104", "GS102")]


def at(finding: Finding, step: int, entity: str | None = None) -> Finding:
    return replace(finding, evidence=(Evidence("nonfinite", entity, step, step, 1.0),))


def test_what_does_no_harm_explains_none() -> None:
    given = [finding("GS104", Severity.INFO), finding("GS503", Severity.ERROR)]
    assert [f.explained_by for f in arrange(given)] == [(), ()]


def test_what_comes_later_explains_nothing() -> None:
    given = [at(finding("GS503", Severity.ERROR), 50), at(finding("GS003", Severity.ERROR), 0)]
    assert [f.explained_by for f in arrange(given)] == [(), ()]


def test_the_first_of_loss_and_gradient_to_break_is_the_cause() -> None:
    for loss, gradient, root in ((5, 5, "GS501"), (5, 6, "GS501"), (6, 5, "GS503")):
        given = [
            at(finding("GS501", Severity.ERROR), loss),
            at(finding("GS503", Severity.ERROR), gradient),
        ]
        (first, second) = arrange(given)
        assert first.code == root
        assert second.explained_by == (root,)


def test_a_broken_input_breaks_gradient_and_loss() -> None:
    given = [
        at(finding("GS501", Severity.ERROR), 9),
        at(finding("GS503", Severity.ERROR), 9, "input"),
    ]
    assert [(f.code, f.explained_by) for f in arrange(given)] == [
        ("GS503", ()),
        ("GS501", ("GS503",)),
    ]


def test_what_is_said_of_a_broken_input_explains_what_it_broke() -> None:
    given = [
        at(finding("GS607", Severity.ERROR), 9, "input"),
        at(finding("GS503", Severity.ERROR), 9, "input"),
        at(finding("GS501", Severity.ERROR), 9),
    ]
    assert [(f.code, f.explained_by) for f in arrange(given)] == [
        ("GS607", ()),
        ("GS501", ("GS607", "GS503")),
        ("GS503", ("GS607",)),
    ]


def test_that_nothing_is_learned_is_explained_by_whatever_does_harm() -> None:
    given = [
        at(finding("GS203", Severity.WARNING), 80),
        at(finding("GS404", Severity.WARNING), 90),
        at(finding("GS204", Severity.INFO), 0),
    ]
    assert {f.code: f.explained_by for f in arrange(given)} == {
        "GS203": ("GS404",),
        "GS404": (),
        "GS204": (),
    }


def test_large_steps_that_decay_makes_are_the_decay_s() -> None:
    given = [
        at(finding("GS401", Severity.ERROR), 4),
        at(finding("GS403", Severity.ERROR), 0),
        at(finding("GS303", Severity.ERROR), 9),
    ]
    assert {f.code: f.explained_by for f in arrange(given)} == {
        "GS403": (),
        "GS401": ("GS403",),
        "GS303": ("GS403", "GS401"),
    }


def test_there_is_a_root_whatever_was_found() -> None:
    everything = [at(finding(rule.code, Severity.ERROR), 3) for rule in BUILTIN]
    roots = [f.code for f in arrange(everything) if not f.explained_by]
    assert roots[0] == "GS002"
    assert "GS607" in roots


def test_a_broken_input_is_nobodys_consequence() -> None:
    given = [
        at(finding("GS104", Severity.ERROR), 0),
        at(finding("GS503", Severity.ERROR), 9, "input"),
    ]
    assert [f.explained_by for f in arrange(given)] == [(), ()]


@pytest.mark.parametrize("asked", BUILTIN, ids=lambda asked: asked.code)
def test_every_rule_has_its_page(asked: Rule[object]) -> None:
    at = [asked.doc.find(f"## {section}\n") for section in SECTIONS]
    assert -1 not in at
    assert at == sorted(at)
    assert all(asked.section(section) for section in SECTIONS)
    assert asked.doc.partition("\n")[0].endswith(".")
    assert is_dataclass(asked.limits)


def test_rules_stand_in_the_order_of_their_codes() -> None:
    codes = [asked.code for asked in BUILTIN]
    assert codes == sorted(set(codes))
    assert {code for codes in EXPLAINS.values() for code in codes} <= set(codes)
