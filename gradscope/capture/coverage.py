"""What was seen and what was not, of a step and of a whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradscope.capture.guard import Problem
from gradscope.capture.modules import ModuleTaps
from gradscope.capture.parameters import ParameterReader
from gradscope.record import Run

_COUNTS = ("forwards", "optimizer_steps", "closed_steps", "recorded_steps")
_COUNTED = (*_COUNTS, "seconds_in_hooks", "seconds_watched")


class Account:
    """What was counted and seen so far, and of a run that was resumed what was before."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.earlier: Mapping[str, Any] = {}
        self._seen: dict[str, Any] = {}

    def note(self, reader: ParameterReader | None, taps: ModuleTaps | None) -> bool:
        """A step was recorded; returns whether it is time to write down what is known."""
        self.counts["recorded_steps"] += 1
        # Of a step that was skipped nothing was read: what was seen before still counts.
        before, self._seen = self._seen, {**self._seen, **_of_step(reader, taps)}
        # At powers of two as well, for a run that is killed: the counts and what it cost go on.
        return self._seen != before or self.counts["recorded_steps"].bit_count() == 1

    def total(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, and what is known at this moment."""
        return _of_run(self.earlier, {**self._seen, **self.counts, **now})


def _of_step(reader: ParameterReader | None, taps: ModuleTaps | None) -> dict[str, Any]:
    """Of a recorded step: what was expected, and what was seen."""
    coverage: dict[str, Any] = {}
    if reader is not None:
        coverage["parameters"] = {"expected": reader.expected, "seen": reader.gradients_read}
    if taps is not None:
        coverage["modules"] = taps.coverage()
    return coverage


def _of_run(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
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
