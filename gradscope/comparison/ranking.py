"""From cells to configurations in tiers: what can be told apart, and what can't."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from gradscope.comparison.result import (
    Cell,
    Configuration,
    Interval,
    Name,
    interval,
)

# Decades by which two scores have to differ to matter: a factor 2 from end to end.
_MATTERS = math.log10(2)
# A gradient that shrinks is worse than one that grows as much: growth a smaller learning rate
# mends. In 40 configurations ranked by their loss, about twice.
_SHRINKS = 2.0
_ENOUGH = 3

# ln χ by theory and why not, for a configuration's cells.
Theory = Callable[[Name, Sequence[Cell]], tuple[float, str]]


def score(cell: Cell) -> float:
    """Decades that the gradient's norm loses (twice) or gains; inf where it can't train.

    Over the depth or over time, whichever is worse.
    """
    if cell.failure is not None:
        return math.inf
    ways = [d for d in (cell.decades, cell.time_decades) if not math.isnan(d)]
    if not ways:
        return math.nan
    return max(-_SHRINKS * d if d < 0 else d for d in ways)


def ranked(
    cells: Iterable[Cell], snippets: Mapping[Name, str], theory: Theory
) -> tuple[Configuration, ...]:
    """Best first, in tiers.

    Configurations share their random numbers seed by seed, so the difference of two is known
    better than each: the best of a tier takes with it those whose paired difference from it has 0
    in its 95 % interval (Student's t), or is less than a factor 2 from end to end.
    """
    groups: dict[Name, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.name, []).append(cell)
    made = [_configuration(name, group, snippets, theory) for name, group in groups.items()]
    made.sort(key=lambda c: (_unknown_last(c.score.mean), str(c.name)))
    placed: list[Configuration] = []
    tier, head = 0, None
    for configuration in made:
        if head is None or _apart(head, configuration):
            tier, head = tier + 1, configuration
        placed.append(replace(configuration, tier=tier))
    return tuple(placed)


def _unknown_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _configuration(
    name: Name, cells: Sequence[Cell], snippets: Mapping[Name, str], theory: Theory
) -> Configuration:
    ordered = tuple(sorted(cells, key=lambda cell: cell.seed))
    failures = [cell.failure for cell in ordered if cell.failure is not None]
    growth = interval([cell.slope for cell in ordered])
    predicted, remark = theory(name, ordered)
    many = f" (in {len(failures)} of {len(ordered)} seeds)" if len(failures) < len(ordered) else ""
    return Configuration(
        name=name,
        cells=ordered,
        tier=0,
        score=_of_scores([score(cell) for cell in ordered]),
        growth=growth,
        theory=predicted,
        remark=remark,
        failure=failures[0] + many if failures else None,
        snippet=snippets.get(name, ""),
    )


def _of_scores(scores: Sequence[float]) -> Interval:
    return Interval(math.inf) if math.inf in scores else interval(scores)


def _apart(head: Configuration, other: Configuration) -> bool:
    """Whether the second is worse for sure, and by so much that it matters."""
    if math.isinf(other.score.mean) or math.isnan(other.score.mean):
        return not _equal(head.score.mean, other.score.mean)
    difference = _paired(other.cells, head.cells, score)
    if len(difference) == 0:
        return True
    mean = float(np.mean(difference))
    if mean <= _MATTERS:
        return False
    if len(difference) < _ENOUGH:
        return True
    return interval(difference).low > 0


def _equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _paired(one: Sequence[Cell], other: Sequence[Cell], of: Callable[[Cell], float]) -> list[float]:
    by_seed = {cell.seed: cell for cell in other}
    return [of(cell) - of(by_seed[cell.seed]) for cell in one if cell.seed in by_seed]


def agreement(configurations: Sequence[Configuration]) -> float:
    """Spearman's rank correlation of score and loss after training; NaN for fewer than three.

    What can't train, or diverged at every rate, comes last in both.
    """
    pairs = [
        (c.score.mean, float(np.mean([cell.trained for cell in c.cells])))
        for c in configurations
        if not math.isnan(c.score.mean)
    ]
    pairs = [pair for pair in pairs if not math.isnan(pair[1])]
    if len(pairs) < _ENOUGH:
        return math.nan
    scores, losses = (stats.rankdata(values) for values in zip(*pairs, strict=True))
    if np.ptp(scores) == 0 or np.ptp(losses) == 0:
        return math.nan
    return float(stats.spearmanr(scores, losses).statistic)
