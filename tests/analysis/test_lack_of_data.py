"""What the rules of loops and steps make of runs in which little or nothing is known."""

from typing import Any

import numpy as np
import pytest

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.rule import SECTIONS, Rule
from gradscope.analysis.rules.adam_epsilon_dominates import adam_epsilon_dominates
from gradscope.analysis.rules.eval_mode_in_training import eval_mode_in_training
from gradscope.analysis.rules.gradient_ascent import gradient_ascent
from gradscope.analysis.rules.gradients_not_cleared import gradients_not_cleared
from gradscope.analysis.rules.learning_rate_collapsed import learning_rate_collapsed
from gradscope.analysis.rules.never_updated import never_updated
from gradscope.analysis.rules.repeated_batch import repeated_batch
from gradscope.analysis.rules.weight_decay_dominates import weight_decay_dominates
from tests.analysis.asking import reason, said, steps_of, unmoved
from tests.analysis.synthetic import Builder
from tests.analysis.test_batch_rules import dropping, fed, off_since
from tests.analysis.test_depth_rules import STUCK
from tests.analysis.test_gradient_rules import arriving, recorded, summed
from tests.analysis.test_step_rules import below_epsilon, shrinking

RULES: tuple[Rule[Any], ...] = (
    never_updated,
    gradients_not_cleared,
    gradient_ascent,
    eval_mode_in_training,
    repeated_batch,
    learning_rate_collapsed,
    weight_decay_dominates,
    adam_epsilon_dominates,
)
asked = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def measured(steps: int) -> Builder:
    """A run in which each of the rules finds something to judge."""
    arrived = arriving(steps)
    builder = steps_of(steps, loss=STUCK, rate=1e-6, weight_decay=0.1)
    recorded(builder, summed(arrived), arrived)
    dropping(fed(builder, input=1, target=0), 0, off_since(9, steps))
    shrinking(builder, 0.05)
    return below_epsilon(unmoved(builder, "layers.1.weight"), 0.9, 1e-3)


@asked
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_nothing_known_is_no_finding(rule: Rule[Any], steps: int) -> None:
    builder = measured(max(steps, 20))
    for arrays in builder.arrays.values():
        for quantity, values in arrays.items():
            arrays[quantity] = np.full((steps, values.shape[1]), np.nan)
    builder.steps = np.arange(steps)
    builder.scalars = {name: np.full(steps, np.nan) for name in builder.scalars}
    assert reason(builder.build(), rule)


@asked
def test_a_model_without_parameters(rule: Rule[Any]) -> None:
    builder = measured(60)
    for table in ("parameters", "modules"):
        builder.entities[table] = []
        builder.arrays[table] = {name: np.full((60, 0), np.nan) for name in builder.arrays[table]}
    found = said(builder.build(), rule)
    # The input is no parameter's.
    assert (found is not None) is (rule is repeated_batch)


@asked
@pytest.mark.parametrize("holes", [0.1, 0.5, 0.9])
def test_holes_are_no_crash(rule: Rule[Any], holes: float) -> None:
    builder = measured(60)
    draw = np.random.default_rng(0)
    for arrays in (*builder.arrays.values(), builder.scalars):
        for values in arrays.values():
            values[draw.random(values.shape) < holes] = np.nan
    report = analyze(builder.build(), rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]


@asked
def test_its_page_is_whole(rule: Rule[Any]) -> None:
    assert all(rule.section(title) for title in SECTIONS)


@asked
def test_a_healthy_loop_is_silent(rule: Rule[Any]) -> None:
    builder = steps_of(60, weight_decay=1e-2)
    arrived = arriving(60)
    recorded(builder, arrived, arrived)
    dropping(fed(builder, input=0, target=0), 1, 1)
    assert said(below_epsilon(builder, 0.0, 0.3).build(), rule) is None
