"""What half and double of each limit would do: `python -m benchmarks.limits RUNS`.

RUNS is a folder that `benchmarks.detection --every 1` kept its runs in. Asked is each rule alone,
with one limit changed at a time: how many faulty trainings of the tuning half that it may be the
diagnosis of it names, and of how many sound ones (healthy, and repaired twins of that half) it
complains. Kept in docs/limits.json, for docs/rules.md.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gradscope
from gradscope.analysis.finding import Severity
from gradscope.analysis.rule import Rule
from gradscope.analysis.rules import BUILTIN
from gradscope.record import Run
from tests.zoo.case import Faulty
from tests.zoo.catalogue import FAULTY
from tests.zoo.split import half

KEPT = Path(__file__).parent.parent / "docs" / "limits.json"
_FACTORS = {"half": 0.5, "as it is": 1.0, "double": 2.0}


@dataclass(frozen=True, slots=True)
class Variant:
    """A rule with one of its limits changed."""

    code: str
    limit: str
    factor: str


def variants() -> dict[Variant, Rule[Any]]:
    """Of every rule with every limit that is a number."""
    made = {}
    for rule in BUILTIN:
        for field in fields(rule.limits):
            value = getattr(rule.limits, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            for factor, times in _FACTORS.items():
                other = max(1, round(value * times)) if isinstance(value, int) else value * times
                limits = replace(rule.limits, **{field.name: other})
                made[Variant(rule.code, field.name, factor)] = replace(rule, limits=limits)
    return made


def complaining(folder: Path) -> list[Variant]:
    """Which of them find something harmful in the run."""
    run = gradscope.load(folder)
    known: dict[tuple[str, object], bool] = {}
    found = []
    for variant, rule in variants().items():
        # The rule as it is comes with each of its limits.
        key = rule.code, rule.limits
        if key not in known:
            known[key] = _complains(run, rule)
        if known[key]:
            found.append(variant)
    return found


def _complains(run: Run, rule: Rule[Any]) -> bool:
    findings = gradscope.analyze(run, rules=[rule]).findings
    return any(finding.severity is not Severity.INFO for finding in findings)


@dataclass(frozen=True, slots=True)
class Kept:
    """A run that was kept; accepts: the codes that name its fault, none for a sound one."""

    folder: Path
    accepts: tuple[str, ...]


def kept(runs: Path) -> Iterator[Kept]:
    """Those that limits may be tuned on."""
    for folder in sorted(runs.glob("*-every1*")):
        name, _, rest = folder.name.rpartition("-every1")
        case = FAULTY.get(name.rpartition("-")[0])
        if case is None:
            if _is_healthy(name.rpartition("-")[0]):
                yield Kept(folder, ())
        elif half(case.family) == "tuning" and case.observable:
            yield Kept(folder, () if rest else tuple(case.accepts))


def _is_healthy(name: str) -> bool:
    from benchmarks.detection import case_of  # noqa: PLC0415  (imports torch)

    try:
        return not isinstance(case_of(name), Faulty)
    except (KeyError, ValueError):
        return False


def scores(
    runs: Sequence[Kept], found: Sequence[Sequence[Variant]]
) -> Mapping[str, Mapping[str, Mapping[str, list[int]]]]:
    """By code, limit and factor: faults named, of how many; alarms, of how many sound runs."""
    made: dict[str, dict[str, dict[str, list[int]]]] = {}
    sound = sum(not run.accepts for run in runs)
    for variant in variants():
        faults = sum(variant.code in run.accepts for run in runs)
        loud = [run for run, those in zip(runs, found, strict=True) if variant in those]
        named = sum(variant.code in run.accepts for run in loud)
        alarms = sum(not run.accepts for run in loud)
        by_limit = made.setdefault(variant.code, {}).setdefault(variant.limit, {})
        by_limit[variant.factor] = [named, faults, alarms, sound]
    return made


def main() -> None:
    """Ask all of them of all runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    runs = list(kept(asked.runs))
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        found = list(pool.map(complaining, [run.folder for run in runs]))
    made = scores(runs, found)
    KEPT.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    changed = sum(
        len({tuple(score) for score in by.values()}) > 1
        for of in made.values()
        for by in of.values()
    )
    print(f"{len(runs)} runs; {changed} limits of {sum(map(len, made.values()))} matter")


if __name__ == "__main__":
    main()
