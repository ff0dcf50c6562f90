"""What was seen and what was not, of a step and of a whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradscope.capture.guard import Problem
from gradscope.capture.modules import ModuleTaps
from gradscope.capture.parameters import ParameterReader
from gradscope.record import Run

_COUNTED = (
    "forwards",
    "optimizer_steps",
    "closed_steps",
    "recorded_steps",
    "seconds_in_hooks",
    "seconds_watched",
)


def of_step(reader: ParameterReader | None, taps: ModuleTaps | None) -> dict[str, Any]:
    """Of a recorded step: what was expected, and what was seen."""
    coverage: dict[str, Any] = {}
    if reader is not None:
        coverage["parameters"] = {"expected": reader.expected, "seen": reader.gradients_read}
    if taps is not None:
        coverage["modules"] = taps.coverage()
    return coverage


def of_run(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run that was resumed: counts add up, and what was seen once was seen."""
    return {
        **earlier,
        **now,
        **{name: earlier.get(name, 0) + now[name] for name in _COUNTED},
        "optimizers": now["optimizers"] or earlier.get("optimizers", []),
        "loss_seen": now["loss_seen"] or earlier.get("loss_seen", False),
    }


def with_problems(run: Run, problems: Sequence[Problem], coverage: Mapping[str, Any]) -> Run:
    """The run with what this process knows even if it could not be written."""
    known = [{"part": p.part, "message": p.message} for p in problems]
    written = [{"part": p["part"], "message": p["message"]} for p in run.meta["problems"]]
    meta = {
        **run.meta,
        "problems": [*run.meta["problems"], *(p for p in known if p not in written)],
        "coverage": dict(coverage),
    }
    return replace(run, meta=meta)
