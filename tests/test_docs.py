"""What is made from the code says what the code says."""

import json

from docs.rules import EXAMPLES, HERE, SCORES, page
from gradscope.analysis.rules import BUILTIN


def test_the_rules_pages_are_up_to_date() -> None:
    examples = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    assert examples.keys() <= {rule.code for rule in BUILTIN}
    made = (HERE / "rules.md").read_text(encoding="utf-8")
    assert made == page(examples, scores), "run: python -m docs.rules"
