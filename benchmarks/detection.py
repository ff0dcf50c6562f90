"""What the rules say of sick and healthy trainings: `python -m benchmarks.detection --help`.

The zoo (tests/zoo) is trained once per seed, and its runs are kept in a folder: after a rule has
changed they are only judged again. Of the half of the families that no limit may be tuned on only
sums are printed.
"""

import argparse
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import gradscope
import gradscope.errors
from gradscope.record import Run, Table
from tests.zoo import generated
from tests.zoo.case import Faulty, Healthy
from tests.zoo.catalogue import FAULTY, HEALTHY
from tests.zoo.split import half

# A fault that leaves the loss within this factor of its twin's progress did no harm.
_BITES = 1.5
# What a healthy training leaves of the loss at most: one that does not learn is not healthy.
_LEARNS = 0.9
# Of these records the first verdict that leads with the right cause is looked for.
_PREFIXES = (2, 5, 10, 20, 40, 80, 160, 320)


@dataclass(frozen=True, slots=True)
class Job:
    """One training to be judged: by the name of its case, as programs can't be sent around."""

    name: str
    seed: int
    every: int | None
    repaired: bool
    folder: Path

    @property
    def run_folder(self) -> Path:
        """Where its log is kept."""
        cadence = "budget" if self.every is None else f"every{self.every}"
        twin = "-repaired" if self.repaired else ""
        return self.folder / f"{self.name}-{self.seed}-{cadence}{twin}"


@dataclass(frozen=True, slots=True)
class Result:
    """What was said of it, and how its loss went: the last fifth over the first."""

    job: Job
    roots: tuple[str, ...]
    messages: tuple[str, ...]
    skipped: tuple[str, ...]
    loss: float
    # The step from which on the right cause leads; NaN: never.
    seen_at: float = math.nan


def case_of(name: str) -> Faulty | Healthy:
    """The case of that name, from the catalogue or generated."""
    if name in FAULTY:
        return FAULTY[name]
    if name in HEALTHY:
        return HEALTHY[name]
    _, seed, rest = name.split("-", 2)
    for fault in generated.FAULTS:
        if rest.startswith(fault):
            return generated.faulty(int(seed), fault)
    return generated.healthy(int(seed))


def judge(job: Job) -> Result:
    """Train it, unless its run is there, and ask the rules."""
    from tests.zoo import judge as judging  # noqa: PLC0415  (torch, once per process)

    case = case_of(job.name)
    try:
        run = judging.trained(
            case, job.run_folder, seed=job.seed, every=job.every, repaired=job.repaired
        )
    except gradscope.errors.ConfigError as refusal:
        # An error before the first step is the earliest verdict; whether it names the fault is
        # for the reader of the verbose table.
        roots = case.accepts[:1] if isinstance(case, Faulty) and not job.repaired else ("refused",)
        return Result(job, roots, (f"refused: {refusal}",), (), math.inf, 0.0)
    report = gradscope.analyze(run)
    found = judging.verdict(report)
    messages = tuple(
        f"{finding.code} {finding.severity.value}: {finding.message}"
        for finding in report.findings
        if finding.severity.value != "info"
    )
    at = math.nan
    if isinstance(case, Faulty) and not job.repaired and found.leads(case.accepts):
        at = _seen_at(run, case)
    return Result(job, found.roots, messages, found.failures, _ratio(run), at)


def _seen_at(run: Run, case: Faulty) -> float:
    from tests.zoo.judge import judged  # noqa: PLC0415

    for records in _PREFIXES:
        if records >= len(run.recorded_steps):
            break
        if judged(until(run, records)).leads(case.accepts):
            return float(run.recorded_steps[records - 1])
    return float(run.recorded_steps[-1])


def until(run: Run, records: int) -> Run:
    """The run as it was after so many records."""
    last = int(run.recorded_steps[records - 1])
    seen = run.steps <= last

    def cut(table: Table) -> Table:
        kept = table.steps <= last
        return Table(table.entities, table.steps[kept], table.quantities, table.values[:, kept])

    return replace(
        run,
        parameters=cut(run.parameters),
        modules=cut(run.modules),
        signals=cut(run.signals),
        steps=run.steps[seen],
        scalars={name: values[seen] for name, values in run.scalars.items()},
    )


def _ratio(run: Run) -> float:
    loss = run.scalars["loss"].astype(np.float64)
    if not loss.size or not np.isfinite(loss[-1]):
        return math.inf
    known = loss[np.isfinite(loss)]
    return float(np.median(known[-max(1, known.size // 5) :]) / known[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge the chosen part of the zoo, and print the tables."""
    asked = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = list(_chosen(asked))
    every = None if asked.budget else asked.every
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            Job(name, seed, every, repaired, folder)
            for name in names
            for seed in range(1 if name.startswith("generated") else asked.seeds)
            for repaired in ((False, True) if isinstance(case_of(name), Faulty) else (False,))
        ]
        context = get_context("spawn")
        with ProcessPoolExecutor(asked.jobs, context, initializer=_one_thread) as pool:
            results = []
            for result in pool.map(judge, jobs):
                results.append(result)
                if asked.verbose:
                    _tell(result)
    _print_tables(results, "every step" if every else "default budget")


def _one_thread() -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--half", choices=("tuning", "test", "all"), default="tuning")
    parser.add_argument("--only", choices=("faulty", "healthy"), help="not both")
    parser.add_argument("--case", action="append", help="a name of the catalogue; may be repeated")
    parser.add_argument(
        "--generated", type=int, default=0, help="so many of each kind, healthy ×20"
    )
    parser.add_argument("--catalogue", type=int, default=1, help="0 leaves the catalogue out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--budget", action="store_true", help="the default budget, not every step")
    parser.add_argument("--runs", type=Path, help="keep the runs there, and use those that are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="each run (not of the test half)")
    return parser


def _chosen(asked: argparse.Namespace) -> Iterator[str]:
    if asked.case:
        yield from asked.case
        return
    if asked.verbose and asked.half != "tuning":
        sys.exit("single runs are shown of the tuning half only: nobody tunes on the other")
    wanted: set[str] = {"tuning", "test"} if asked.half == "all" else {asked.half}
    if asked.only != "healthy":
        if asked.catalogue:
            yield from (c.name for c in FAULTY.values() if half(c.family) in wanted)
        for fault in generated.FAULTS:
            if half(fault) in wanted:
                yield from (generated.faulty(i, fault).name for i in range(asked.generated))
    if asked.only != "faulty":
        if asked.catalogue:
            yield from HEALTHY
        yield from (generated.healthy(seed).name for seed in range(20 * asked.generated))


def _tell(result: Result) -> None:
    case = case_of(result.job.name)
    wanted = case.accepts if isinstance(case, Faulty) and not result.job.repaired else ()
    right = bool(result.roots) and result.roots[0] in wanted if wanted else not result.roots
    if right and not result.skipped:
        return
    twin = " (repaired)" * result.job.repaired
    expected = "/".join(wanted) or "silence"
    print(f"{result.job.name}{twin} seed {result.job.seed}: {expected}, got {result.roots}")
    for line in (*result.messages, *result.skipped):
        print(f"    {line}")
    sys.stdout.flush()


def _print_tables(results: Sequence[Result], cadence: str) -> None:
    twins = {(r.job.name, r.job.seed): r for r in results if r.job.repaired}
    families: dict[str, list[Result]] = defaultdict(list)
    healthy: dict[str, list[Result]] = defaultdict(list)
    left_out = 0
    for result in results:
        case, is_drawn = case_of(result.job.name), result.job.name.startswith("generated")
        if isinstance(case, Healthy):
            if is_drawn and result.loss > _LEARNS:
                left_out += 1
            else:
                healthy[case.family].append(result)
        elif not result.job.repaired:
            if is_drawn and not _bites(result, twins[result.job.name, result.job.seed]):
                left_out += 1
            else:
                families[case.family if case.observable else "(not observable)"].append(result)
    print(f"\nFaulty, {cadence}: runs, some warning, right cause, first, root findings, step")
    for family in sorted(families):
        _line(family, families[family])
    _line("all", [r for family, known in families.items() if family[0] != "(" for r in known])
    print("\nHealthy: runs, false alarms")
    _healthy("repaired twins", twins.values())
    for family in sorted(healthy):
        _healthy(family, healthy[family])
    _healthy("all", [result for known in healthy.values() for result in known])
    if left_out:
        print(f"{left_out} generated ones left out: a fault without harm, or nothing learned")


def _bites(result: Result, twin: Result) -> bool:
    return not result.loss <= _BITES * twin.loss


def _line(family: str, results: Sequence[Result]) -> None:
    if not results:
        return
    cases = [case_of(result.job.name) for result in results]
    accepted = [case.accepts for case in cases if isinstance(case, Faulty)]
    some = np.mean([bool(result.roots) for result in results])
    right = np.mean(
        [any(c in ok for c in r.roots) for r, ok in zip(results, accepted, strict=True)]
    )
    first = np.mean(
        [bool(r.roots) and r.roots[0] in ok for r, ok in zip(results, accepted, strict=True)]
    )
    roots = np.mean([len(result.roots) for result in results])
    known = [result.seen_at for result in results if not math.isnan(result.seen_at)]
    step = f"{np.median(known):.0f}" if known else "–"
    print(
        f"    {family:36} {len(results):4} {some:6.0%} {right:6.0%} {first:6.0%}"
        f" {roots:6.2f} {step:>6}"
    )


def _healthy(family: str, results: Iterable[Result]) -> None:
    known = list(results)
    if not known:
        return
    alarms = sum(bool(result.roots) for result in known)
    # Clopper and Pearson 1934: of no alarm in n, at 95 %.
    upper = 1 - 0.05 ** (1 / len(known)) if not alarms else math.nan
    bound = f", at 95 % confidence less than {upper:.1%}" if not alarms else ""
    print(f"    {family:36} {len(known):4} runs, {alarms} with a false alarm{bound}")


if __name__ == "__main__":
    main()
