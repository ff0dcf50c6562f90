"""The command line: gradscope demo, report RUN, compare MODEL, rules, explain RULE."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from gradscope.errors import GradscopeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    The exit status is 0; 1 where `report --fail-on` found something; 2, with a message, where it
    can't work.
    """
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "demo":
            _demo(parsed.output)
        elif parsed.command == "compare":
            from gradscope.comparison.command import run_compare  # noqa: PLC0415  (needs torch)

            return run_compare(parsed)
        elif parsed.command == "rules":
            _rules(as_json=parsed.json)
        elif parsed.command == "explain":
            _explain(parsed.rule)
        else:
            return _report(parsed.runs, parsed.output, parsed.fail_on)
    except (GradscopeError, OSError) as error:
        print(f"gradscope: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradscope", description="Where a training's gradients go wrong, why, what to do."
    )
    parser.add_argument(
        "--version", action="version", version=f"gradscope {version('torch-gradscope')}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train three small nets and diagnose them")
    demo.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("gradscope-demo"),
        metavar="FOLDER",
        help="folder for the runs and reports (default: %(default)s)",
    )
    report = commands.add_parser("report", help="diagnose recorded runs")
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's folder (watch's log_dir); several stand side by side in one HTML page",
    )
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write to .html, .md, .json or .txt instead of the terminal; may be repeated",
    )
    report.add_argument(
        "--fail-on",
        choices=("error", "warning"),
        help="exit with status 1 where a finding is that severe",
    )
    _add_compare(commands)
    rules = commands.add_parser("rules", help="list the rules")
    rules.add_argument("--json", action="store_true", help="with their limits, for machines")
    explain = commands.add_parser("explain", help="what a rule measures, why, and by which limits")
    explain.add_argument("rule", metavar="RULE", help="its code or name: GS101")
    return parser


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = commands.add_parser(
        "compare",
        help="which initialization and activation let the gradient reach a model's first layer",
        description="Measures initializations x activations on your model and batch. What is given "
        "as package.module:name is a function without arguments, or the thing itself.",
    )
    compare.add_argument("model", metavar="MODEL", help="package.module:name, an nn.Module")
    compare.add_argument(
        "--data",
        required=True,
        metavar="BATCH",
        help="package.module:name: (inputs..., target), or a mapping for model(**batch)",
    )
    compare.add_argument(
        "--loss",
        metavar="LOSS",
        help="package.module:name, as torch.nn.functional:cross_entropy; without it the output's "
        ".loss counts",
    )
    for option, what in (
        ("--initializations", "kaiming_normal,orthogonal,lsuv,..."),
        ("--activations", "own,relu,gelu,..."),
        ("--mitigations", "none,layernorm,residual,..."),
    ):
        compare.add_argument(option, metavar="NAMES", help=f"separated by commas: {what}")
    compare.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    compare.add_argument(
        "--train-steps",
        type=int,
        default=0,
        metavar="STEPS",
        help="train each that long, at four learning rates (default: %(default)s)",
    )
    compare.add_argument(
        "--workers", type=int, default=0, help="processes (default: in this one alone)"
    )
    compare.add_argument(
        "--log-dir",
        type=Path,
        metavar="FOLDER",
        help="keep what was measured there, for TensorBoard, and to go on after an interruption",
    )
    compare.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write to .html, .csv or .txt, too; may be repeated",
    )


def _demo(folder: Path) -> None:
    from gradscope.demo import run_demo  # noqa: PLC0415  (the only command that needs torch)

    run_demo(folder)


def _rules(*, as_json: bool) -> None:
    from gradscope.analysis.config import configured_rules  # noqa: PLC0415  (--help stays quick)
    from gradscope.analysis.plugins import available  # noqa: PLC0415
    from gradscope.reporters.rules import print_rules, rules_json  # noqa: PLC0415

    asked = {rule.code: rule for rule in configured_rules()}
    rules = [asked.get(rule.code, rule) for rule in available()]
    if as_json:
        print(rules_json(rules, asked))  # noqa: T201
    else:
        print_rules(rules, asked)


def _explain(wanted: str) -> None:
    from gradscope.analysis.config import configured_rules, rule_called  # noqa: PLC0415
    from gradscope.analysis.plugins import available  # noqa: PLC0415
    from gradscope.reporters.rules import print_rule  # noqa: PLC0415

    asked = {rule.code: rule for rule in configured_rules()}
    found = rule_called(wanted, available())
    # With the project's limits, if it is asked.
    print_rule(asked.get(found.code, found))


def _report(runs: Sequence[Path], outputs: Sequence[Path], fail_on: str | None) -> int:
    from gradscope import reporters  # noqa: PLC0415  (--help stays quick)
    from gradscope.analysis.analyzer import analyze  # noqa: PLC0415
    from gradscope.analysis.config import configured_rules  # noqa: PLC0415
    from gradscope.analysis.finding import Severity  # noqa: PLC0415
    from gradscope.log.reader import load  # noqa: PLC0415

    rules = configured_rules()
    reports = [analyze(load(run), rules) for run in runs]
    if not outputs:
        for number, (run, report) in enumerate(zip(runs, reports, strict=True)):
            if len(reports) > 1:
                print("\n" * bool(number) + f"{run}\n")  # noqa: T201
            report.print()
    for path in outputs:
        reporters.write_reports(reports, path)
        print(path)  # noqa: T201
    severities = [finding.severity for report in reports for finding in report.findings]
    return int(fail_on is not None and max(severities, default=Severity.INFO) >= Severity(fail_on))
