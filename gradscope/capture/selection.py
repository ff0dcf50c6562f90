"""The single layers that TensorBoard is asked to show, beside what it shows of any model."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from gradscope.analysis.words import count, listed
from gradscope.capture.config import patterns
from gradscope.capture.entities import Roster
from gradscope.capture.guard import Guard
from gradscope.capture.recorder import Shown
from gradscope.errors import ConfigError

# Two curves each: more than anyone looks at, and TensorBoard still opens at once.
_MAX_LAYERS = 50
# Of some 0.5 kB at every recorded step.
_MAX_HISTOGRAMS = 8
_NAMED = 5


def names_near(pattern: str, names: Sequence[str]) -> str:
    """Some names that a pattern which matches none of them may have meant."""
    near = get_close_matches(pattern, names, n=3, cutoff=0.4)
    return f"near are: {', '.join(near)}" if near else f"there are: {listed(names)}"


class Selection:
    """The parameters that were asked for by name; they only become more, up to a limit."""

    def __init__(self, roster: Roster, guard: Guard) -> None:
        self._roster = roster
        self._guard = guard
        self._layers: tuple[str, ...] = ()
        self._histograms: tuple[str, ...] = ()

    def add(
        self, layers: str | Sequence[str] | None, histograms: str | Sequence[str] | None
    ) -> None:
        """Ask for those that match.

        Raises ConfigError for a pattern that matches nothing, ConfigTypeError for what is none.
        """
        curves, counted = self._matching("layers", layers), self._matching("histograms", histograms)
        self._layers = self._joined("layers", self._layers, curves, _MAX_LAYERS)
        self._histograms = self._joined("histograms", self._histograms, counted, _MAX_HISTOGRAMS)

    def shown(self, user_tags: Iterable[str]) -> Shown:
        """What a packet is to show: of the parameters asked for, those that are known by now."""
        tags = frozenset(user_tags)
        if not self._layers and not self._histograms:
            return Shown(tags, {}, {})
        return Shown(
            tags,
            self._roster.parameter_rows(self._layers),
            self._roster.parameter_rows(self._histograms),
        )

    def _matching(self, argument: str, given: str | Sequence[str] | None) -> list[str]:
        names = self._roster.parameter_names()
        wanted = patterns(argument, given)
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                message = f"{argument}={pattern!r} matches no watched parameter; "
                message += names_near(pattern, names)
                raise ConfigError(message)
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]

    def _joined(
        self, argument: str, known: tuple[str, ...], asked: list[str], limit: int
    ) -> tuple[str, ...]:
        new = [name for name in asked if name not in known]
        taken, left_out = new[: limit - len(known)], new[limit - len(known) :]
        if left_out:
            self._guard.say(
                "TensorBoard",
                f"{argument}: TensorBoard gets {limit} of the parameters asked for, "
                f"{count(len(left_out), 'further one')} not: {listed(left_out, _NAMED)}; "
                "narrower patterns choose others, and the run holds all of them",
            )
        return (*known, *taken)
