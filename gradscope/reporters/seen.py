"""How much of the model was seen, in words; where it was not all, what was missed and why."""

from collections.abc import Iterator, Mapping

from gradscope.analysis.coverage import Coverage, coverage, never_ran, reasons_of_modules
from gradscope.analysis.words import count, listed
from gradscope.record import Run

_NAMED = 5


def seen_in_words(run: Run) -> str:
    """How many parameters and modules were seen where it was the fewest; "" where nothing was."""
    found = coverage(run)
    if found is None:
        return ""
    known = [(noun, seen) for noun, seen in found.kinds.items() if seen.expected]
    if any(seen.unseen for _, seen in known):
        parts = [f"{seen.amount:,} of {count(seen.expected, noun)}" for noun, seen in known]
        return f"{', '.join(parts)} {_when(found)}"
    everything = " and ".join(count(seen.expected, noun) for noun, seen in known)
    return everything and f"{everything} in every recorded step"


def blind_spots(run: Run) -> Iterator[str]:
    """What of the model was not seen, and why; a sentence each."""
    found = coverage(run)
    reasons = reasons_of_modules(run)
    if found is not None:
        yield from _unseen(found)
        reasons = {name: why for name, why in reasons.items() if name not in found.modules.unseen}
    silent = [name for name in never_ran(run) if name not in reasons]
    if silent:
        yield f"modules that never ran: {listed(silent, _NAMED)}"
    for why, names in _by_reason(reasons).items():
        yield f"the outputs, or their gradients, of {listed(names, _NAMED)}, because {why}"


def _unseen(found: Coverage) -> Iterator[str]:
    for noun, seen in found.kinds.items():
        for why, names in _by_reason(seen.unseen).items():
            yield (
                f"{len(names):,} of {count(seen.expected, noun)} {_when(found)} "
                f"({listed(names, _NAMED)}), because {why}"
            )


def _when(found: Coverage) -> str:
    return "in every recorded step" if found.always else f"at step {found.step}"


def _by_reason(unseen: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in unseen.items():
        reasons.setdefault(why, []).append(name)
    return reasons
