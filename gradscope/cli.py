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
            _report(parsed.run, parsed.output)
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
    report = commands.add_parser("report", help="diagnose a recorded run")
    report.add_argument("run", type=Path, metavar="RUN", help="the run's folder (watch's log_dir)")
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write to .html, .json or .txt instead of the terminal; may be repeated",
    )
    return parser


def _demo(folder: Path) -> None:
    from gradscope.demo import run_demo  # noqa: PLC0415  (the only command that needs torch)

    run_demo(folder)


def _report(run: Path, outputs: Sequence[Path]) -> None:
    from gradscope.analysis.analyzer import analyze  # noqa: PLC0415  (--help stays quick)
    from gradscope.log.reader import load  # noqa: PLC0415

    report = analyze(load(run))
    if not outputs:
        report.print()
    for path in outputs:
        report.write(path)
        print(path)  # noqa: T201
