"""Where a report's numbers come from: what was measured, and what was not seen."""

from collections.abc import Iterator, Mapping
from typing import Any

from gradscope.analysis.words import listed, number, share
from gradscope.record import Run
from gradscope.reporters.seen import blind_spots, seen_in_words

_NAMED = 5
# Of the steps of an optimizer, so small a share of what it is of another's is no accident.
_RARELY = 0.25


def particulars(run: Run) -> dict[str, str]:
    """The run in a few labelled facts; what is not known has no entry."""
    facts = {
        "Model": _model(run.meta),
        "Steps": _steps(run),
        "Seen": seen_in_words(run),
        "Overhead": _overhead(run.meta),
        "Optimizer": _optimizers(run.meta),
        "Sampling": str(run.meta.get("sampling") or ""),
        "Device": str(run.meta.get("device", "")),
        "Versions": ", ".join(map(" ".join, _mapping(run.meta, "versions").items())),
        "Started": str(run.meta.get("created", "")),
        "Log": str(run.meta.get("log_dir") or ""),
    }
    return {label: fact for label, fact in facts.items() if fact}


def unseen(run: Run) -> list[str]:
    """What was not seen, and why; a sentence each."""
    return [
        *blind_spots(run),
        *_gaps(run.meta),
        *_problems(run.meta),
        *map(str, run.meta.get("left_out", ())),
    ]


def _model(meta: Mapping[str, Any]) -> str:
    name, total = str(meta.get("model", "")), meta.get("parameters")
    if total is None:
        return name
    trainable = meta.get("trainable_parameters", total)
    some = "" if trainable == total else f", {trainable:,} of them trainable"
    return f"{name}, {total:,} parameters{some}"


def _steps(run: Run) -> str:
    if not len(run.steps):
        return "none was seen"
    cadence = run.meta.get("cadence")
    recorded = f"{len(run.recorded_steps):,} recorded" + (f" ({cadence})" if cadence else "")
    resumed = [f"{step:,}" for step in run.meta.get("resumed", ())]
    again = f", resumed at {listed(resumed, _NAMED)}" if resumed else ""
    return f"{run.steps[0]} to {run.steps[-1]}, {recorded}{again}"


def _optimizers(meta: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{optimizer.get('type', 'unknown')}"
        + (f", learning rate {number(float(optimizer['lr']))}" if "lr" in optimizer else "")
        for optimizer in _mapping(meta, "coverage").get("optimizers", ())
    )


def _overhead(meta: Mapping[str, Any]) -> str:
    coverage = _mapping(meta, "coverage")
    spent, whole = coverage.get("seconds_in_hooks", 0.0), coverage.get("seconds_watched", 0.0)
    if not 0 < spent < whole:
        return ""
    return f"{share(spent / (whole - spent))} of the training time, {number(spent)} s in hooks"


def _gaps(meta: Mapping[str, Any]) -> Iterator[str]:
    coverage = _mapping(meta, "coverage")
    modules = _mapping(coverage, "modules")
    if modules.get("output_gradients_unseen"):
        names = listed(modules["output_gradients_unseen"], _NAMED)
        yield f"the gradient at the outputs of {names}"
    yield from _unrecorded(coverage)
    if meta.get("level") == "parameters":
        yield 'updates and module outputs: the run was recorded with level="parameters"'
    if coverage.get("loss_seen") is False:
        yield "the loss: without it harm can't be judged; add scope.log(loss=loss) to the loop"
    if coverage.get("unfinished_step"):
        yield "the last step: it had not ended"


def _unrecorded(coverage: Mapping[str, Any]) -> Iterator[str]:
    """Optimizers whose turns fall between the recorded steps, though they step as often."""
    known = [one for one in coverage.get("optimizers", ()) if one.get("steps")]
    shares = [one["recorded_steps"] / one["steps"] for one in known]
    for number_of, (one, recorded) in enumerate(zip(known, shares, strict=True), start=1):
        if recorded < _RARELY * max(shares):
            done = f"{one['recorded_steps']:,} of its {one['steps']:,} steps were recorded"
            yield (
                f"optimizer {number_of} ({one.get('type', 'unknown')}): {done}, as the recorded "
                "steps are other optimizers' turns; an every that the turns do not divide, or "
                "every=1, records all of them"
            )


def _problems(meta: Mapping[str, Any]) -> Iterator[str]:
    for problem in meta.get("problems", ()):
        # The gaps say this already.
        if problem.get("part") != "loss":
            yield str(problem.get("message", ""))


def _mapping(owner: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = owner.get(key)
    return found if isinstance(found, Mapping) else {}
