"""GS005, GS208, GS403 and GS404 on runs with a known diagnosis."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Severity
from gradscope.analysis.rule import SECTIONS, Rule
from gradscope.analysis.rules.adam_epsilon_dominates import adam_epsilon_dominates
from gradscope.analysis.rules.learning_rate_collapsed import learning_rate_collapsed
from gradscope.analysis.rules.never_updated import never_updated
from gradscope.analysis.rules.weight_decay_dominates import weight_decay_dominates
from tests.analysis.synthetic import WIDTH, Builder, Chain
from tests.analysis.test_depth_rules import STUCK
from tests.analysis.test_loop_rules import reason, said, trained_by
from tests.analysis.test_unit_rules import CONVERGED, LEARNING

RULES: tuple[Rule[Any], ...] = (
    never_updated,
    learning_rate_collapsed,
    weight_decay_dominates,
    adam_epsilon_dominates,
)


def chain(
    steps: int = 100, loss: tuple[float, float] = LEARNING, rate: object = 1e-3, **optimizer: Any
) -> Builder:
    """Four layers, trained by Adam unless said."""
    meta = trained_by(**{"type": "Adam", "eps": 1e-8, **optimizer})
    builder = Chain(layers=4, steps=steps, loss=loss, meta=meta).builder()
    builder.scalars["learning_rate"][:] = rate
    builder.arrays["parameters"]["grad_rms"][:] = 0.1 / WIDTH
    builder.arrays["parameters"]["update_lost_fraction"][:] = 0.0
    return builder


def weights(builder: Builder) -> list[str]:
    names = (entity.name for entity in builder.entities["parameters"])
    return [name for name in names if name.endswith("weight")]


def unmoved(builder: Builder, *names: str, lost: object = 1.0) -> Builder:
    """Steps leave these as they are (or this share of their entries)."""
    for name in names:
        builder.set("parameters", "update_lost_fraction", name, lost)
        if lost == 1:
            for quantity in ("update_norm", "update_ratio"):
                builder.set("parameters", quantity, name, 0.0)
            builder.set("parameters", "weight_norm", name, 11.0)
    return builder


class TestNeverUpdated:
    def test_a_model_whose_dtype_loses_every_step(self) -> None:
        builder = chain(loss=STUCK, rate=1e-6)
        finding = said(unmoved(builder, *weights(builder)).build(), never_updated)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "4 weights" in finding.message
        assert "too small for their dtype" in finding.message
        assert "autocast" in finding.remedies[0]
        assert [e.observed for e in finding.evidence] == [1.0] * 3

    def test_one_in_which_a_few_entries_move(self) -> None:
        for lost, expected in ((0.95, True), (0.85, False)):
            builder = chain(loss=STUCK, rate=1e-5)
            run = unmoved(builder, *weights(builder), lost=lost).build()
            assert (said(run, never_updated) is not None) is expected
            # A single layer of that kind is no finding.
            builder = chain(loss=STUCK, rate=1e-5)
            assert said(unmoved(builder, "layers.1.weight", lost=lost).build(), never_updated) is (
                None
            )

    def test_one_of_which_a_part_is_lost_to_the_bit(self) -> None:
        builder = unmoved(chain(loss=STUCK, rate=1e-6), "layers.0.weight")
        unmoved(builder, *weights(builder)[1:], lost=0.98)
        finding = said(builder.build(), never_updated)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "4 weights" in finding.message
        assert "leaves 98% of their entries or more as they were" in finding.message

    @pytest.mark.parametrize(
        ("loss", "severity"),
        [(STUCK, Severity.WARNING), (LEARNING, Severity.INFO), (CONVERGED, Severity.INFO)],
    )
    def test_a_group_whose_rate_is_zero(
        self, loss: tuple[float, float], severity: Severity
    ) -> None:
        # Its weights are no larger than those beside it, which move.
        finding = said(unmoved(chain(loss=loss), "layers.1.weight").build(), never_updated)
        assert finding is not None
        assert finding.severity is severity
        assert finding.layer == "layers.1"
        assert "rate of their group is zero" in finding.message
        assert "param_groups" in finding.remedies[0]

    def test_large_weights_whose_steps_are_lost_while_small_ones_move(self) -> None:
        builder = unmoved(chain(), "layers.1.weight")
        builder.set("parameters", "weight_rms", "layers.1.weight", 1.0)
        finding = said(builder.build(), never_updated)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert "too small for their dtype" in finding.message
        # The scale of a norm is the first that a dtype can't move, and does little harm.
        at = builder.at("parameters", "layers.1.weight")
        entities = builder.entities["parameters"]
        entities[at] = replace(entities[at], group="norm")
        finding = said(builder.build(), never_updated)
        assert finding is not None
        assert finding.severity is Severity.INFO

    @pytest.mark.parametrize(
        ("quantity", "value"),
        [
            ("requires_grad", 0),
            ("in_optimizer", 0),
            # No entry had a gradient, or it was another optimizer's turn.
            ("update_lost_fraction", np.nan),
            # Between the records it has moved.
            ("weight_norm", np.linspace(11, 12, 100)),
            # It moved once, a step was not skipped.
            ("update_lost_fraction", np.where(np.arange(100) == 50, 0.0, 1.0)),
        ],
    )
    def test_who_is_not_judged(self, quantity: str, value: object) -> None:
        builder = unmoved(chain(loss=STUCK), "layers.1.weight")
        builder.set("parameters", quantity, "layers.1.weight", value)
        assert said(builder.build(), never_updated) is None

    def test_a_bias_may_get_nothing_but_round_off(self) -> None:
        assert said(unmoved(chain(loss=STUCK), "layers.1.bias").build(), never_updated) is None

    def test_steps_at_a_rate_of_zero_do_not_count(self) -> None:
        rates = np.where(np.arange(100) < 96, 0.0, 1e-3)
        builder = chain(loss=STUCK, rate=rates)
        assert said(unmoved(builder, *weights(builder)).build(), never_updated) is None

    @pytest.mark.parametrize(("gradient", "expected"), [(1e-9, False), (1e-3, True)])
    def test_a_step_that_no_dtype_holds_is_another_s(self, gradient: float, expected: bool) -> None:
        # Relative to weights of 0.18: 6e-10, less than the 6e-8 of float32; and 6e-4.
        builder = chain(loss=STUCK, rate=0.1, type="SGD")
        builder.arrays["parameters"]["grad_rms"][:] = gradient
        run = unmoved(builder, *weights(builder)).build()
        assert (said(run, never_updated) is not None) is expected

    def test_nor_one_that_epsilon_makes_small(self) -> None:
        # A gradient of 1e-13, over an ε of 1e-8, times the rate.
        builder = chain(loss=STUCK)
        run = unmoved(builder, *weights(builder)).build()
        assert said(run, never_updated) is not None
        builder.arrays["parameters"]["grad_rms"][:] = 1e-13
        assert said(builder.build(), never_updated) is None

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = chain(20, loss=STUCK)
        unmoved(builder, *weights(builder)[1:])
        builder.scalars["loss"] *= 10**scale
        builder.arrays["parameters"]["grad_norm"] *= 10**scale
        found = said(builder.shuffled(seed).build(), never_updated)
        assert found is not None
        assert found.severity is Severity.ERROR


def scheduled(rates: NDArray[Any], losses: NDArray[Any], *, follow: bool = True) -> Builder:
    """A run of these rates and losses; updates follow the rate, or do not."""
    builder = chain(len(rates), rate=rates, type="SGD")
    noise = np.random.default_rng(0).normal(0, 0.01, len(rates))
    builder.scalars["loss"] = losses + noise
    if follow and rates.max() > 0:
        factor = (rates / rates.max())[:, None]
        for quantity in ("update_norm", "update_ratio"):
            builder.arrays["parameters"][quantity] *= factor
    return builder


STEPS = 300
# Ten times less every thirty steps: a thousandth at 90.
EVERY_THIRTY = 0.1 * 0.1 ** (np.arange(STEPS) // 30)
# What a loss does that follows the rate: it falls until it is lost.
AT_REST = 2.3 - np.minimum(np.arange(STEPS), 40) * 0.02
FALLING = np.linspace(2.3, 1.0, STEPS)
# At rest within the first ten steps of the thirty with a high rate.
EARLY_REST = 2.3 - np.minimum(np.arange(STEPS), 10) * 0.08
NOTHING = np.full(STEPS, 2.3)


class TestLearningRateCollapsed:
    def test_a_scheduler_that_counts_batches_as_epochs(self) -> None:
        finding = said(scheduled(EVERY_THIRTY, AT_REST).build(), learning_rate_collapsed)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert "from 0.1 to" in finding.message
        assert "since step 90" in finding.message
        assert finding.evidence[0].first_step == 90
        assert "scheduler.step()" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("losses", "severity"),
        [
            # Sixty steps at a tenth of it or more are no trial.
            (NOTHING, Severity.ERROR),
            # It falls all the same; it has converged.
            (FALLING, Severity.INFO),
            (np.linspace(2.3, 0.0, STEPS) ** 8 / 2.3**7 + 0.1, Severity.INFO),
        ],
    )
    def test_what_the_loss_says(self, losses: NDArray[Any], severity: Severity) -> None:
        finding = said(scheduled(EVERY_THIRTY, losses).build(), learning_rate_collapsed)
        assert finding is not None
        assert finding.severity is severity

    @pytest.mark.parametrize(
        ("losses", "severity"),
        [
            (EARLY_REST, Severity.INFO),
            # Still falling when the rate fell.
            (2.3 - np.minimum(np.arange(STEPS), 100) * 0.01, Severity.WARNING),
        ],
    )
    def test_a_rate_that_is_lowered_when_the_loss_rests(
        self, losses: NDArray[Any], severity: Severity
    ) -> None:
        rates = np.where(np.arange(STEPS) < 100, 0.1, 1e-6)
        finding = said(scheduled(rates, losses).build(), learning_rate_collapsed)
        assert finding is not None
        assert finding.severity is severity

    @pytest.mark.parametrize(
        "rates",
        [
            0.05 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)),
            np.linspace(0, 0.1, STEPS),
            np.linspace(0.1, 0, STEPS),
            # Restarts, and a fall of a hundredfold.
            0.05 * (1 + np.cos(np.pi * (np.arange(STEPS) % 50) / 50)),
            0.1 * 0.1 ** np.minimum(np.arange(STEPS) // 30, 2),
            # An exponential decay that reaches a thousandth of it in the last third.
            0.1 * 10 ** (-4 * np.arange(STEPS) / STEPS),
        ],
        ids=["cosine", "warm-up", "linear", "restarts", "hundredth", "exponential"],
    )
    def test_schedules_in_order(self, rates: NDArray[Any]) -> None:
        assert said(scheduled(rates, NOTHING).build(), learning_rate_collapsed) is None

    def test_only_the_first_group_rests(self) -> None:
        builder = scheduled(EVERY_THIRTY, NOTHING, follow=False)
        assert said(builder.build(), learning_rate_collapsed) is None

    def test_a_rate_of_zero_all_along(self) -> None:
        builder = scheduled(np.zeros(STEPS), NOTHING)
        assert said(builder.build(), learning_rate_collapsed) is None
        builder.arrays["parameters"]["update_norm"][:] = 0
        finding = said(builder.build(), learning_rate_collapsed)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "is 0 in all of 300 steps" in finding.message

    def test_a_short_run(self) -> None:
        run = scheduled(np.full(10, 0.1), np.ones(10)).build()
        assert "10 steps" in reason(run, learning_rate_collapsed)

    @given(scale=st.floats(-6, 6), rate=st.floats(-6, 6))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_rate_s_matters(
        self, scale: float, rate: float
    ) -> None:
        builder = scheduled(EVERY_THIRTY * 10**rate, AT_REST)
        builder.scalars["loss"] *= 10**scale
        finding = said(builder.build(), learning_rate_collapsed)
        assert finding is not None
        assert finding.severity is Severity.WARNING


def shrinking(
    builder: Builder, to: float, gradient: float = 1e-3, first: float | None = None
) -> Builder:
    """All weights shrink to this share, under gradients of this length."""
    table = builder.arrays["parameters"]
    table["weight_norm"] = (
        table["weight_norm"][:1] * np.linspace(1, to, len(builder.steps))[:, None]
    )
    table["grad_norm"][:] = gradient
    if first is not None:
        table["grad_norm"][0] = first
    return builder


class TestWeightDecayDominates:
    def test_weights_that_are_driven_to_zero(self) -> None:
        builder = shrinking(chain(loss=STUCK, type="SGD", weight_decay=0.1), 0.05)
        finding = said(builder.build(), weight_decay_dominates)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "shrunk to 5.0% of its first size" in finding.message.replace(" 5% ", " 5.0% ")
        assert "in place of 0.1" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("to", "gradient", "decay"),
        [
            # Weights that keep their size; a gradient that is larger; hardly any decay; none.
            (0.6, 1e-3, 0.1),
            (0.05, 1e3, 0.1),
            (0.05, 1e-3, 1e-6),
            (0.05, 1e-3, 0.0),
        ],
    )
    def test_what_is_in_order(self, to: float, gradient: float, decay: float) -> None:
        builder = shrinking(chain(loss=STUCK, type="SGD", weight_decay=decay), to, gradient)
        assert said(builder.build(), weight_decay_dominates) is None

    def test_the_share_in_a_coupled_step(self) -> None:
        # 0.1 of a norm of 11.3, beside a gradient that long: half of the two at first.
        whole = 2**0.5 * WIDTH**0.5
        for gradient, expected in ((0.09 * whole, False), (0.01 * whole, True)):
            builder = shrinking(chain(loss=STUCK, type="SGD", weight_decay=0.1), 0.2, gradient)
            assert (said(builder.build(), weight_decay_dominates) is not None) is expected

    def test_the_share_in_a_decoupled_one(self) -> None:
        # A change of 1e-3 of the first norm; the rate times the decay is that share of the norm.
        for decay, expected in ((0.2, False), (2.0, True)):
            builder = shrinking(chain(loss=STUCK, type="AdamW", weight_decay=decay), 0.3, 1e9)
            assert (said(builder.build(), weight_decay_dominates) is not None) is expected

    @pytest.mark.parametrize(
        ("loss", "to", "severity"),
        [
            (STUCK, 0.3, Severity.ERROR),
            (LEARNING, 0.3, None),
            (LEARNING, 0.05, Severity.INFO),
            (CONVERGED, 0.05, Severity.INFO),
        ],
    )
    def test_harm(self, loss: tuple[float, float], to: float, severity: Severity | None) -> None:
        builder = shrinking(chain(loss=loss, type="SGD", weight_decay=0.1), to)
        finding = said(builder.build(), weight_decay_dominates)
        assert (finding.severity if finding else None) is severity

    def test_without_a_loss_only_a_collapse_is_a_warning(self) -> None:
        for to, severity in ((0.3, None), (0.05, Severity.WARNING)):
            builder = shrinking(chain(type="SGD", weight_decay=0.1), to)
            builder.scalars["loss"][:] = np.nan
            finding = said(builder.build(), weight_decay_dominates)
            assert (finding.severity if finding else None) is severity

    def test_of_two_optimizers_it_is_not_known_whose_a_weight_is(self) -> None:
        builder = shrinking(chain(type="SGD", weight_decay=0.1), 0.05)
        builder.meta["coverage"]["optimizers"] *= 2
        assert "2 optimizers" in reason(builder.build(), weight_decay_dominates)
        builder.meta.pop("coverage")
        assert "no optimizer" in reason(builder.build(), weight_decay_dominates)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_weights_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = shrinking(chain(20, loss=STUCK, type="SGD", weight_decay=0.1), 0.05)
        for quantity in ("weight_norm", "update_norm", "grad_norm"):
            builder.arrays["parameters"][quantity] *= 10**scale
        finding = said(builder.shuffled(seed).build(), weight_decay_dominates)
        assert finding is not None
        assert finding.severity is Severity.ERROR


def below_epsilon(builder: Builder, portion: object, step: float, *names: str) -> Builder:
    """√v̂ is below ε in this share of the weights, and steps are so many learning rates long."""
    builder.arrays["parameters"]["epsilon_share"][:] = 0.0
    for name in names or weights(builder):
        builder.set("parameters", "epsilon_share", name, portion)
    builder.arrays["parameters"]["update_norm"][:] = step * 1e-3 * WIDTH
    return builder


class TestAdamEpsilonDominates:
    def test_gradients_far_below_epsilon(self) -> None:
        builder = below_epsilon(chain(loss=STUCK), 0.99, 1e-3)
        finding = said(builder.build(), adam_epsilon_dominates)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "1e-8" in finding.message
        assert "are 1e-3 of the learning rate" in finding.message
        assert finding.evidence[1].observed == pytest.approx(1e-3, rel=1e-3)
        assert "eps=" in finding.remedies[0]

    def test_while_the_loss_falls_it_is_information(self) -> None:
        finding = said(below_epsilon(chain(), 0.99, 1e-3).build(), adam_epsilon_dominates)
        assert finding is not None
        assert finding.severity is Severity.INFO

    @pytest.mark.parametrize(
        ("portion", "step"),
        [
            (0.4, 1e-3),
            # A half of the entries rests, and the steps are as long as they should be.
            (0.99, 0.3),
            # At the end of the training.
            (np.where(np.arange(100) < 60, 0.0, 1.0), 1e-3),
        ],
    )
    def test_what_is_in_order(self, portion: object, step: float) -> None:
        builder = below_epsilon(chain(loss=STUCK), portion, step)
        assert said(builder.build(), adam_epsilon_dominates) is None

    def test_a_single_layer_is_not_most(self) -> None:
        builder = below_epsilon(chain(loss=STUCK), 0.99, 1e-3, "layers.0.weight")
        assert said(builder.build(), adam_epsilon_dominates) is None

    def test_what_gets_no_gradient_is_zero_by_right(self) -> None:
        builder = below_epsilon(chain(loss=STUCK), 0.99, 1e-3)
        builder.arrays["parameters"]["grad_norm"][:] = 0
        assert "fewer than 5 steps" in reason(builder.build(), adam_epsilon_dominates)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_rate_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = below_epsilon(chain(20, loss=STUCK), 0.99, 1e-3)
        builder.scalars["learning_rate"] *= 10**scale
        builder.arrays["parameters"]["update_norm"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), adam_epsilon_dominates)
        assert finding is not None
        assert finding.evidence[1].observed == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_nothing_known_is_no_finding(rule: Rule[Any], steps: int) -> None:
    builder = chain(max(steps, 1), weight_decay=0.1)
    for arrays in builder.arrays.values():
        for quantity, values in arrays.items():
            arrays[quantity] = np.full((steps, values.shape[1]), np.nan)
    builder.steps = np.arange(steps)
    builder.scalars = {name: np.full(steps, np.nan) for name in builder.scalars}
    assert reason(builder.build(), rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_model_without_parameters(rule: Rule[Any]) -> None:
    builder = chain(rate=EVERY_THIRTY[:100], weight_decay=0.1)
    builder.entities = {table: [] for table in builder.entities}
    builder.arrays = {
        table: {name: np.full((100, 0), np.nan) for name in arrays}
        for table, arrays in builder.arrays.items()
    }
    report = analyze(builder.build(), rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert not report.findings


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
@pytest.mark.parametrize("holes", [0.1, 0.5, 0.9])
def test_holes_are_no_crash(rule: Rule[Any], holes: float) -> None:
    builder = shrinking(chain(loss=STUCK, rate=1e-6, weight_decay=0.1), 0.05)
    below_epsilon(unmoved(builder, "layers.1.weight"), 0.9, 1e-3)
    draw = np.random.default_rng(0)
    for arrays in (*builder.arrays.values(), builder.scalars):
        for values in arrays.values():
            values[draw.random(values.shape) < holes] = np.nan
    report = analyze(builder.build(), rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_its_page_is_whole(rule: Rule[Any]) -> None:
    assert all(rule.section(title) for title in SECTIONS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_healthy_chain_is_silent(rule: Rule[Any]) -> None:
    builder = below_epsilon(chain(weight_decay=1e-2), 0.0, 0.3)
    assert said(builder.build(), rule) is None
