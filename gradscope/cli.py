"""The command line: gradscope demo, gradscope report RUN."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from gradscope.errors import GradscopeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 with a message where it can't work."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "demo":
            _demo(parsed.output)
        else:
            _report(parsed.runs, parsed.output)
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
    return parser


def _demo(folder: Path) -> None:
    from gradscope.demo import run_demo  # noqa: PLC0415  (the only command that needs torch)

    run_demo(folder)


def _report(runs: Sequence[Path], outputs: Sequence[Path]) -> None:
    from gradscope import reporters  # noqa: PLC0415  (--help stays quick)
    from gradscope.analysis.analyzer import analyze  # noqa: PLC0415
    from gradscope.log.reader import load  # noqa: PLC0415

    reports = [analyze(load(run)) for run in runs]
    if not outputs:
        for number, (run, report) in enumerate(zip(runs, reports, strict=True)):
            if len(reports) > 1:
                print("\n" * bool(number) + f"{run}\n")  # noqa: T201
            report.print()
    for path in outputs:
        reporters.write_reports(reports, path)
        print(path)  # noqa: T201
