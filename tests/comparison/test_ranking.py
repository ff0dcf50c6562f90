"""Tiers and agreement, on cells written by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradscope.comparison.ranking import agreement, ranked, score
from gradscope.comparison.result import Cell, Configuration, Name, as_json, from_json, interval

_LN10 = math.log(10)


def _cells(name: str, decades: Sequence[float], *, failure: str | None = None) -> list[Cell]:
    return [
        Cell(
            Name(name),
            seed,
            gradient=np.zeros(11),
            # Ten ratios: decades = slope * 10 / (2 ln 10).
            slope=d * 2 * _LN10 / 10,
            failure=failure,
            trained=abs(d),
        )
        for seed, d in enumerate(decades)
    ]


def _ranked(*groups: list[Cell]) -> tuple[Configuration, ...]:
    return ranked([c for group in groups for c in group], {}, lambda *_: (math.nan, ""))


def test_shrinkage_weighs_double_and_the_worse_of_depth_and_time_counts() -> None:
    assert score(_cells("a", [2.0])[0]) == pytest.approx(2)
    assert score(_cells("a", [-2.0])[0]) == pytest.approx(4)
    # Two ratios: time_decades = time_slope / ln 10; the first three don't count.
    both = Cell(Name("a"), 0, gradient=np.zeros(11), slope=0.0, time_slope=-4 * _LN10, time_steps=3)
    assert both.time_decades == pytest.approx(-4)
    assert score(both) == pytest.approx(2)
    assert score(replace(both, time_slope=-2 * _LN10)) == 0
    assert score(replace(both, time_slope=2 * _LN10)) == pytest.approx(2)


def test_what_pairing_tells_apart_is_not_of_one_tier() -> None:
    noise = [0.0, 3.0, 1.0, 4.0, 2.0]
    close = _cells("better", noise)
    # Worse by half a decade in every seed: less than the scatter, yet certain.
    worse = _cells("worse", [d + 0.5 for d in noise])
    made = _ranked(worse, close)
    assert [(str(c.name), c.tier) for c in made] == [("better + own", 1), ("worse + own", 2)]


def test_differences_that_change_sign_or_do_not_matter_are_one_tier() -> None:
    one = _cells("one", [1.0, 3.0, 2.0])
    other = _cells("other", [4.0, 1.0, 3.0])
    slightly = _cells("slightly", [1.1, 3.1, 2.1])
    assert {c.tier for c in _ranked(one, other, slightly)} == {1}


def test_all_in_which_the_gradient_arrives_are_of_the_first_tier() -> None:
    made = _ranked(
        _cells("flat", [0.0, 0.0, 0.0]),
        _cells("grows", [0.9, 0.9, 0.9]),
        _cells("shrinks", [-0.4, -0.4, -0.4]),
        _cells("more", [-0.6, -0.6, -0.6]),
    )
    assert [(c.name.initialization, c.tier, c.arrives) for c in made] == [
        ("flat", 1, True),
        ("shrinks", 1, True),
        ("grows", 1, True),
        ("more", 2, False),
    ]
    assert not any(c.arrives for c in _ranked(_cells("lost", [-3.0, -3.0, -3.0])))


def _trained(name: str, decades: float, early: Sequence[float]) -> list[Cell]:
    cells = _cells(name, [decades] * len(early))
    return [replace(cell, early=loss) for cell, loss in zip(cells, early, strict=True)]


def test_where_the_gradient_does_not_tell_half_apart_the_first_losses_do() -> None:
    made = _ranked(
        _trained("slow", 0.0, [2.0, 2.1, 2.2]),
        _trained("fast", 0.5, [1.0, 1.1, 1.2]),
        # By less than a twentieth, though in each seed.
        _trained("as_fast", 0.2, [1.03, 1.13, 1.23]),
        _trained("lost", -3.0, [0.1, 0.1, 0.1]),
    )
    assert [(c.name.initialization, c.tier, c.arrives) for c in made] == [
        ("fast", 1, True),
        ("as_fast", 1, True),
        ("slow", 2, True),
        ("lost", 3, False),
    ]


def test_where_it_does_the_first_losses_change_nothing() -> None:
    made = _ranked(
        _trained("slow", 0.0, [2.0, 2.1, 2.2]),
        _trained("fast", 0.5, [1.0, 1.1, 1.2]),
        _trained("lost", -3.0, [0.1, 0.1, 0.1]),
        _trained("lost_too", -5.0, [0.1, 0.1, 0.1]),
    )
    assert [(c.name.initialization, c.tier) for c in made] == [
        ("slow", 1),
        ("fast", 1),
        ("lost", 2),
        ("lost_too", 3),
    ]


def test_what_diverged_at_every_rate_comes_after_what_did_not() -> None:
    made = _ranked(
        _trained("diverged", 0.0, [math.inf, 1.0, 1.0]),
        _trained("fast", 0.5, [1.0, 1.1, 1.2]),
        _trained("faster", 0.5, [0.5, 0.6, 0.7]),
    )
    assert [(c.name.initialization, c.tier) for c in made] == [
        ("faster", 1),
        ("fast", 2),
        ("diverged", 3),
    ]


def test_failures_and_unknowns_come_last() -> None:
    made = _ranked(
        _cells("dead", [0.0, 0.0, 0.0], failure="the loss is nan"),
        _cells("fine", [0.1, 0.1, 0.2]),
        _cells("unknown", [math.nan] * 3),
    )
    assert made[0].name.initialization == "fine"
    assert made[0].tier == 1
    assert all(c.tier > 1 for c in made[1:])


def test_agreement_is_spearmans() -> None:
    made = _ranked(
        _cells("a", [1.0, 1.1, 1.2]), _cells("b", [-3.0, -3.1, -3.3]), _cells("c", [2.0, 2.1, 2.3])
    )
    assert agreement(made) == pytest.approx(1)
    other = [replace(c, tier=tier) for c, tier in zip(made, (2, 1, 1), strict=True)]
    losses = [c.mean("trained") for c in made]
    assert agreement(other) == pytest.approx(stats.spearmanr([2, 1, 1], losses).statistic)
    assert math.isnan(agreement(made[:2]))


def test_the_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    made = interval(values)
    assert (made.low, made.high) == pytest.approx((low, high))
    assert math.isnan(interval([1.0]).low)


def test_a_cell_comes_back_from_json() -> None:
    cell = Cell(Name("a", "b", "c"), 3, gradient=np.array([1.0, -np.inf]), failure="why")
    back = from_json(as_json(cell))
    assert back.name == cell.name
    assert back.failure == "why"
    assert math.isnan(back.slope)
    np.testing.assert_array_equal(back.gradient, cell.gradient)
