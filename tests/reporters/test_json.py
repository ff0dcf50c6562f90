import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest

from gradscope.analysis.report import Report
from gradscope.reporters.json import JsonReporter, to_json
from tests.reporters.samples import HOSTILE, empty_run, finding, report_of, run_of, sick_report

SCHEMA: dict[str, Any] = json.loads(
    resources.files("gradscope.reporters").joinpath("report.schema.json").read_text("utf-8")
)
CHECKER = jsonschema.Draft202012Validator(SCHEMA)


def test_golden(check_golden: Callable[[str, str], None]) -> None:
    check_golden("report_sick.json", JsonReporter().render(sick_report()))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "report",
    [
        sick_report(),
        report_of(empty_run()),
        report_of(run_of(np.full((1, 1), np.nan), meta={})),
        report_of(run_of(np.ones((2, 2))), *[finding(layer=HOSTILE)] * 500),
    ],
)
def test_documents_keep_the_schema(report: Report) -> None:
    CHECKER.validate(json.loads(JsonReporter().render(report)))


def test_the_schema_knows_no_other_fields() -> None:
    document = to_json(sick_report())
    for owner in (document, document["run"], document["findings"][0], document["rules"][0]):
        owner["surprise"] = 1
        with pytest.raises(jsonschema.ValidationError, match="surprise"):
            CHECKER.validate(document)
        del owner["surprise"]
    CHECKER.validate(document)


def test_what_is_not_finite_is_a_string() -> None:
    document = to_json(sick_report())
    assert [e["observed"] for e in document["findings"][0]["evidence"]] == [1.23456e-6, "NaN"]
    assert document["rules"][0]["limits"] == {"ratio": 0.001, "least": "-Infinity"}
    assert document["run"]["coverage"]["optimizers"][0]["eps"] == "Infinity"


def test_a_hostile_name_comes_back_as_it_was() -> None:
    made = JsonReporter().render(report_of(run_of([[1.0]]), finding(layer=HOSTILE + "\ud800")))
    made.encode("ascii")
    assert json.loads(made)["findings"][0]["layer"] == HOSTILE + "\ud800"


def test_steps() -> None:
    run = to_json(report_of(run_of(np.ones((3, 1)), steps=(5, 10, 15))))["run"]
    assert run["steps_recorded"] == {"count": 3, "first": 5, "last": 15}
    assert to_json(report_of(empty_run()))["run"]["steps_seen"] == {
        "count": 0,
        "first": None,
        "last": None,
    }
