"""Makes docs/rules.md, the rules' pages: `python -m docs.rules [RUNS]`.

With RUNS, a folder that benchmarks.detection kept its runs in, what each rule says of a faulty
training is looked up there anew, and kept in docs/rules.json. What half and double of a limit would
do is in docs/limits.json, by `python -m benchmarks.limits RUNS`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Severity
from gradscope.analysis.pages import limits, sections, summary
from gradscope.analysis.rules import BUILTIN
from gradscope.analysis.words import number
from gradscope.log.reader import load

HERE = Path(__file__).parent
EXAMPLES = HERE / "rules.json"
SCORES = HERE / "limits.json"

# By code, limit and factor: faults named, of how many; alarms, of how many sound runs.
Scores = Mapping[str, Mapping[str, Mapping[str, list[int]]]]

_GROUPS = {
    "GS0": "The loop",
    "GS1": "The signal's path",
    "GS2": "The course of loss and gradient",
    "GS3": "Units and layers",
    "GS4": "The size of steps",
    "GS5": "Numbers",
    "GS6": "Data and loss",
}

_HEAD = """# The rules

Made of the rules' own docstrings, limits and comments by `python -m docs.rules`; in a terminal
`gradscope explain CODE` prints the same. What is quoted was said of a training of the zoo
(tests/zoo) that has the fault, recorded by `python -m benchmarks.detection`; its twin without the
fault got neither warning nor error. How often the rules are right: [accuracy.md](accuracy.md).

In brackets behind a limit stands what half and double of it would do, the rest of the rule being as
it is, to {sound} sound trainings and to the faulty ones of the tuning half that the rule may be the
diagnosis of (`python -m benchmarks.limits`). Where nothing stands, neither changes anything there,
or it is no number.
"""


def page(examples: Mapping[str, Mapping[str, str]], scores: Scores) -> str:
    """The whole page; `examples` has, by code, the training and what was said of it."""
    sound = {of["half"][3] for by_limit in scores.values() for of in by_limit.values()}
    parts = [_HEAD.format(sound=max(sound, default=0))]
    group = ""
    for rule in BUILTIN:
        if rule.code[:3] != group:
            group = rule.code[:3]
            parts.append(f"## {_GROUPS[group]}\n")
        parts.append(f"### {rule.code} {rule.name}\n\n{summary(rule)}\n")
        for title, text in sections(rule).items():
            parts.append(f"**{title}.** {text}\n")
            if title == "What it measures" and (known := limits(rule)):
                listed = (
                    f"- `{limit.name}` = {_shown(limit.default)}: {limit.reason}".rstrip(": ")
                    + _scored(scores.get(rule.code, {}).get(limit.name, {}))
                    for limit in known
                )
                parts.append("**Limits.**\n\n" + "\n".join(listed) + "\n")
        if example := examples.get(rule.code):
            parts.append(f"**Said of `{example['training']}`.** {example['message']}\n")
    return "\n".join(parts)


def _scored(of: Mapping[str, list[int]]) -> str:
    """What half and double would do, if anything."""
    if len({tuple(score) for score in of.values()}) < 2:  # noqa: PLR2004
        return ""
    told = []
    for factor, (named, faults, alarms, _) in of.items():
        faulty = f"{named} of {faults} faults" if faults else ""
        false = f"{alarms} false alarm{'s' * (alarms != 1)}" if alarms or not faults else ""
        told.append(f"{factor}: {' and '.join(filter(None, (faulty, false)))}")
    return f" [{'; '.join(told)}]"


def _shown(value: object) -> str:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return number(float(str(value))) if plain else str(value)


def found(runs: Path) -> dict[str, dict[str, str]]:
    """Of each rule what it said first of a faulty training that may be looked at."""
    # Both need torch, which making the page from what is kept does not.
    from tests.zoo.catalogue import FAULTY  # noqa: PLC0415
    from tests.zoo.split import half  # noqa: PLC0415

    examples: dict[str, dict[str, str]] = {}
    for name, case in sorted(FAULTY.items()):
        folder = runs / f"{name}-0-every1"
        if half(case.family) != "tuning" or not folder.exists():
            continue
        for finding in analyze(load(folder)).findings:
            loud = finding.severity is not Severity.INFO and not finding.explained_by
            if loud and finding.code in case.accepts:
                examples.setdefault(finding.code, {"training": name, "message": finding.message})
    return examples


def main(arguments: list[str]) -> None:
    """Make the page."""
    if arguments:
        text = json.dumps(found(Path(arguments[0])), ensure_ascii=False, indent=1, sort_keys=True)
        EXAMPLES.write_text(text + "\n", encoding="utf-8")
    examples = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    (HERE / "rules.md").write_text(page(examples, scores), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
