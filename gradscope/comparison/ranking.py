"""From cells to configurations in tiers: what can be told apart, and what can't."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from gradscope.analysis.rules.vanishing_through_time import Limits
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
# A tenfold gain, or half as many decades lost, is no obstacle: a network of half the trainable
# depth of 6 ξ loses 0.65 decades of the norm (Schoenholz et al. 2017, section 5). In pre-LN
# transformers the branches that do nothing score best, and train worst.
_ARRIVES = 1.0
# Over time the weights are shared, and get their gradient from the last steps at least.
_TIME_IS_NO_OBSTACLE = -math.log10(Limits().decay)
# A part of the loss by which two trainings have to differ to matter.
_LOSS_MATTERS = 0.05
_ENOUGH = 3

# ln χ by theory and why not, for a configuration's cells.
Theory = Callable[[Name, Sequence[Cell]], tuple[float, str]]


def score(cell: Cell) -> float:
    """Decades that the gradient's norm loses (twice) or gains; inf where it can't train.

    Over the depth or over time, whichever is worse; of those lost over time the first three don't
    count, as with GS106.
    """
    if cell.failure is not None:
        return math.inf
    lost_in_time = min(cell.time_decades + _TIME_IS_NO_OBSTACLE, 0.0)
    in_time = lost_in_time if cell.time_decades < 0 else cell.time_decades
    ways = [d for d in (cell.decades, in_time) if not math.isnan(d)]
    if not ways:
        return math.nan
    return max(-_SHRINKS * d if d < 0 else d for d in ways)


def ranked(
    cells: Iterable[Cell], snippets: Mapping[Name, str], theory: Theory
) -> tuple[Configuration, ...]:
    """Best first, in tiers.

    Configurations share their random numbers seed by seed, so the difference of two is known
    better than each: the best of a tier takes with it those whose paired difference from it has 0
    in its 95 % interval (Student's t), or is less than a factor 2 from end to end. The first tier
    takes all in which the gradient arrives. Where these are more than half of all, and were
    trained, the mean loss of the first steps divides them in the same way.
    """
    groups: dict[Name, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.name, []).append(cell)
    made = [_configuration(name, group, snippets, theory) for name, group in groups.items()]
    tiers = _tiers(made, score, _ARRIVES, lambda _: _MATTERS)
    if 2 * len(tiers[0]) > len(made) and all(_was_trained(c) for c in tiers[0]):
        tiers[:1] = _tiers(
            tiers[0], lambda cell: cell.early, -math.inf, lambda head: _LOSS_MATTERS * abs(head)
        )
    return tuple(
        replace(configuration, tier=number)
        for number, tier in enumerate(tiers, 1)
        for configuration in tier
    )


def _was_trained(configuration: Configuration) -> bool:
    return not math.isnan(configuration.mean("early"))


def _tiers(
    configurations: Sequence[Configuration],
    of: Callable[[Cell], float],
    good: float,
    matters: Callable[[float], float],
) -> list[list[Configuration]]:
    """By a number of which less is better; up to `good` all are as good."""
    means = {c.name: _over_seeds([of(cell) for cell in c.cells]).mean for c in configurations}
    tiers: list[list[Configuration]] = []
    for configuration in sorted(
        configurations, key=lambda c: (_unknown_last(means[c.name]), str(c.name))
    ):
        if tiers and (
            means[configuration.name] <= good
            or not _apart(tiers[-1][0], configuration, means, of, matters)
        ):
            tiers[-1].append(configuration)
        else:
            tiers.append([configuration])
    return tiers


def _unknown_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _configuration(
    name: Name, cells: Sequence[Cell], snippets: Mapping[Name, str], theory: Theory
) -> Configuration:
    ordered = tuple(sorted(cells, key=lambda cell: cell.seed))
    failures = [cell.failure for cell in ordered if cell.failure is not None]
    total = _over_seeds([score(cell) for cell in ordered])
    growth = interval([cell.slope for cell in ordered])
    predicted, remark = theory(name, ordered)
    many = f" (in {len(failures)} of {len(ordered)} seeds)" if len(failures) < len(ordered) else ""
    return Configuration(
        name=name,
        cells=ordered,
        tier=0,
        score=total,
        arrives=total.mean <= _ARRIVES,
        growth=growth,
        theory=predicted,
        remark=remark,
        failure=failures[0] + many if failures else None,
        snippet=snippets.get(name, ""),
    )


def _over_seeds(values: Sequence[float]) -> Interval:
    return Interval(math.inf) if math.inf in values else interval(values)


def _apart(
    head: Configuration,
    other: Configuration,
    means: Mapping[Name, float],
    of: Callable[[Cell], float],
    matters: Callable[[float], float],
) -> bool:
    """Whether the second is worse for sure, and by so much that it matters."""
    best, value = means[head.name], means[other.name]
    if math.isinf(value) or math.isnan(value):
        return not _equal(best, value)
    difference = _paired(other.cells, head.cells, of)
    if len(difference) == 0:
        return True
    by = float(np.mean(difference))
    if by <= matters(best):
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
    """Spearman's rank correlation of tier and loss after training; NaN for fewer than three.

    What diverged at every rate comes last.
    """
    pairs = [
        (c.tier, float(np.mean([cell.trained for cell in c.cells])))
        for c in configurations
        if not math.isnan(c.score.mean)
    ]
    pairs = [pair for pair in pairs if not math.isnan(pair[1])]
    if len(pairs) < _ENOUGH:
        return math.nan
    tiers, losses = (stats.rankdata(values) for values in zip(*pairs, strict=True))
    if np.ptp(tiers) == 0 or np.ptp(losses) == 0:
        return math.nan
    return float(stats.spearmanr(tiers, losses).statistic)
