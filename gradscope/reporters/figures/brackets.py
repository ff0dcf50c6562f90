"""The findings above a picture: a bracket over what each concerns, with its code at the left."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from gradscope.analysis.finding import Finding, Severity
from gradscope.record import Entity
from gradscope.reporters.figures.canvas import figure_of
from gradscope.reporters.figures.labels import marked_rows
from gradscope.reporters.figures.theme import Theme

_MAX_LANES = 4
_LANE, _FIRST_LANE = 9.0, 7.0  # points
# Half of a layer's width on an axis of layers.
_HALF_LAYER = 0.3

Stretch = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Lane:
    """One code, and the stretches of the horizontal axis that its findings concern."""

    label: str
    stretches: tuple[Stretch, ...]


def lanes_of_steps(findings: Iterable[Finding]) -> list[Lane]:
    """From when to when each warning and error was seen; without evidence that is not known."""
    stretches: dict[str, list[Stretch]] = defaultdict(list)
    for finding in harmful(findings):
        seen = finding.span
        if seen is not None:
            stretches[finding.code].append(seen)
    return _lanes(stretches)


def lanes_of_layers(entities: Sequence[Entity], findings: Iterable[Finding]) -> list[Lane]:
    """At which layers, by their places on the axis, each warning and error is."""
    rows: dict[str, list[int]] = defaultdict(list)
    for finding in harmful(findings):
        rows[finding.code] += marked_rows(entities, [finding])
    return _lanes(
        {
            code: [(first - _HALF_LAYER, last + _HALF_LAYER) for first, last in runs(found)]
            for code, found in rows.items()
        }
    )


def harmful(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The warnings and the errors."""
    return (finding for finding in findings if finding.severity is not Severity.INFO)


def runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Where the numbers follow one another: the first and the last of each run."""
    found: list[tuple[int, int]] = []
    for row in sorted(rows):
        if found and row <= found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found


def room_for(lanes: Sequence[Lane]) -> float:
    """How high they are above the axes, in points."""
    return _FIRST_LANE + _LANE * len(lanes) if lanes else 0


def draw_lanes(axes: Axes, lanes: Sequence[Lane], theme: Theme) -> None:
    """Draw the lanes above the axes."""
    low, high = sorted(axes.get_xlim())
    scale = figure_of(axes).dpi_scale_trans
    for place, lane in enumerate(reversed(lanes)):
        up = ScaledTranslation(0, (_FIRST_LANE + _LANE * place) / 72, scale)
        for stretch in lane.stretches:
            bracket = Line2D(
                [min(max(end, low), high) for end in stretch], [1, 1],
                c=theme.ink, lw=1.2, marker="|", ms=6, mew=1.2, solid_capstyle="butt",
                transform=axes.get_xaxis_transform() + up, clip_on=False, label="_finding",
            )  # fmt: skip
            axes.add_artist(bracket)
        axes.annotate(
            lane.label, (0, 1), (-6, _FIRST_LANE + _LANE * place),
            xycoords="axes fraction", textcoords="offset points", ha="right", va="center",
            fontsize=7.5, fontweight="bold", color=theme.ink, annotation_clip=False,
        )  # fmt: skip


def _lanes(stretches: dict[str, list[Stretch]]) -> list[Lane]:
    """A lane for each code; beyond so many, one for the rest of them."""
    known = [(code, found) for code, found in stretches.items() if found]
    shown = known if len(known) <= _MAX_LANES else known[: _MAX_LANES - 1]
    lanes = [Lane(code, _merged(found)) for code, found in shown]
    rest = known[len(shown) :]
    if rest:
        together = [stretch for _, found in rest for stretch in found]
        lanes.append(Lane(f"{len(rest)} more", _merged(together)))
    return lanes


def _merged(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """Without those that others cover."""
    found: list[Stretch] = []
    for first, last in sorted(stretches):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)
