"""GS005, GS403 and GS404 on runs with a known diagnosis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.adam_epsilon_dominates import adam_epsilon_dominates
from gradscope.analysis.rules.never_updated import never_updated
from gradscope.analysis.rules.weight_decay_dominates import weight_decay_dominates
from tests.analysis.asking import reason, said, steps_of, unmoved, weights
from tests.analysis.synthetic import WIDTH, Builder
from tests.analysis.test_depth_rules import STUCK
from tests.analysis.test_unit_rules import CONVERGED, LEARNING


class TestNeverUpdated:
    def test_a_model_whose_dtype_loses_every_step(self) -> None:
        builder = steps_of(loss=STUCK, rate=1e-6)
        finding = said(unmoved(builder, *weights(builder)).build(), never_updated)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "4 weights" in finding.message
        assert "too small for their dtype" in finding.message
        assert "autocast" in finding.remedies[0]
        assert [e.observed for e in finding.evidence] == [1.0] * 3

    def test_one_in_which_a_few_entries_move(self) -> None:
        for lost, expected in ((0.95, True), (0.85, False)):
            builder = steps_of(loss=STUCK, rate=1e-5)
            run = unmoved(builder, *weights(builder), lost=lost).build()
            assert (said(run, never_updated) is not None) is expected
            # A single layer of that kind is no finding.
            builder = steps_of(loss=STUCK, rate=1e-5)
            assert said(unmoved(builder, "layers.1.weight", lost=lost).build(), never_updated) is (
                None
            )

    def test_one_of_which_a_part_is_lost_to_the_bit(self) -> None:
        builder = unmoved(steps_of(loss=STUCK, rate=1e-6), "layers.0.weight")
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
        finding = said(unmoved(steps_of(loss=loss), "layers.1.weight").build(), never_updated)
        assert finding is not None
        assert finding.severity is severity
        assert finding.layer == "layers.1"
        assert "rate of their group is zero" in finding.message
        assert "param_groups" in finding.remedies[0]

    def test_large_weights_whose_steps_are_lost_while_small_ones_move(self) -> None:
        builder = unmoved(steps_of(), "layers.1.weight")
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
        builder = unmoved(steps_of(loss=STUCK), "layers.1.weight")
        builder.set("parameters", quantity, "layers.1.weight", value)
        assert said(builder.build(), never_updated) is None

    def test_a_bias_may_get_nothing_but_round_off(self) -> None:
        assert said(unmoved(steps_of(loss=STUCK), "layers.1.bias").build(), never_updated) is None

    def test_steps_at_a_rate_of_zero_do_not_count(self) -> None:
        rates = np.where(np.arange(100) < 96, 0.0, 1e-3)
        builder = steps_of(loss=STUCK, rate=rates)
        assert said(unmoved(builder, *weights(builder)).build(), never_updated) is None

    @pytest.mark.parametrize(("gradient", "expected"), [(1e-9, False), (1e-3, True)])
    def test_a_step_that_no_dtype_holds_is_another_s(self, gradient: float, expected: bool) -> None:
        # Relative to weights of 0.18: 6e-10, less than the 6e-8 of float32; and 6e-4.
        builder = steps_of(loss=STUCK, rate=0.1, type="SGD")
        builder.arrays["parameters"]["grad_rms"][:] = gradient
        run = unmoved(builder, *weights(builder)).build()
        assert (said(run, never_updated) is not None) is expected

    def test_nor_one_that_epsilon_makes_small(self) -> None:
        # A gradient of 1e-13, over an ε of 1e-8, times the rate.
        builder = steps_of(loss=STUCK)
        run = unmoved(builder, *weights(builder)).build()
        assert said(run, never_updated) is not None
        builder.arrays["parameters"]["grad_rms"][:] = 1e-13
        assert said(builder.build(), never_updated) is None

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = steps_of(20, loss=STUCK)
        unmoved(builder, *weights(builder)[1:])
        builder.scalars["loss"] *= 10**scale
        builder.arrays["parameters"]["grad_norm"] *= 10**scale
        found = said(builder.shuffled(seed).build(), never_updated)
        assert found is not None
        assert found.severity is Severity.ERROR


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
        builder = shrinking(steps_of(loss=STUCK, type="SGD", weight_decay=0.1), 0.05)
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
        builder = shrinking(steps_of(loss=STUCK, type="SGD", weight_decay=decay), to, gradient)
        assert said(builder.build(), weight_decay_dominates) is None

    def test_the_share_in_a_coupled_step(self) -> None:
        # 0.1 of a norm of 11.3, beside a gradient that long: half of the two at first.
        whole = 2**0.5 * WIDTH**0.5
        for gradient, expected in ((0.09 * whole, False), (0.01 * whole, True)):
            builder = shrinking(steps_of(loss=STUCK, type="SGD", weight_decay=0.1), 0.2, gradient)
            assert (said(builder.build(), weight_decay_dominates) is not None) is expected

    def test_the_share_in_a_decoupled_one(self) -> None:
        # A change of 1e-3 of the first norm; the rate times the decay is that share of the norm.
        for decay, expected in ((0.2, False), (2.0, True)):
            builder = shrinking(steps_of(loss=STUCK, type="AdamW", weight_decay=decay), 0.3, 1e9)
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
        builder = shrinking(steps_of(loss=loss, type="SGD", weight_decay=0.1), to)
        finding = said(builder.build(), weight_decay_dominates)
        assert (finding.severity if finding else None) is severity

    def test_without_a_loss_only_a_collapse_is_a_warning(self) -> None:
        for to, severity in ((0.3, None), (0.05, Severity.WARNING)):
            builder = shrinking(steps_of(type="SGD", weight_decay=0.1), to)
            builder.scalars["loss"][:] = np.nan
            finding = said(builder.build(), weight_decay_dominates)
            assert (finding.severity if finding else None) is severity

    def test_of_two_optimizers_it_is_not_known_whose_a_weight_is(self) -> None:
        builder = shrinking(steps_of(type="SGD", weight_decay=0.1), 0.05)
        builder.meta["coverage"]["optimizers"] *= 2
        assert "2 optimizers" in reason(builder.build(), weight_decay_dominates)
        builder.meta.pop("coverage")
        assert "no optimizer" in reason(builder.build(), weight_decay_dominates)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_weights_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = shrinking(steps_of(20, loss=STUCK, type="SGD", weight_decay=0.1), 0.05)
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
        builder = below_epsilon(steps_of(loss=STUCK), 0.99, 1e-3)
        finding = said(builder.build(), adam_epsilon_dominates)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "1e-8" in finding.message
        assert "are 1e-3 of the learning rate" in finding.message
        assert finding.evidence[1].observed == pytest.approx(1e-3, rel=1e-3)
        assert "eps=" in finding.remedies[0]

    def test_while_the_loss_falls_it_is_information(self) -> None:
        finding = said(below_epsilon(steps_of(), 0.99, 1e-3).build(), adam_epsilon_dominates)
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
        builder = below_epsilon(steps_of(loss=STUCK), portion, step)
        assert said(builder.build(), adam_epsilon_dominates) is None

    def test_a_single_layer_is_not_most(self) -> None:
        builder = below_epsilon(steps_of(loss=STUCK), 0.99, 1e-3, "layers.0.weight")
        assert said(builder.build(), adam_epsilon_dominates) is None

    def test_what_gets_no_gradient_is_zero_by_right(self) -> None:
        builder = below_epsilon(steps_of(loss=STUCK), 0.99, 1e-3)
        builder.arrays["parameters"]["grad_norm"][:] = 0
        assert "fewer than 5 steps" in reason(builder.build(), adam_epsilon_dominates)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_rate_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        builder = below_epsilon(steps_of(20, loss=STUCK), 0.99, 1e-3)
        builder.scalars["learning_rate"] *= 10**scale
        builder.arrays["parameters"]["update_norm"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), adam_epsilon_dominates)
        assert finding is not None
        assert finding.evidence[1].observed == pytest.approx(1e-3, rel=1e-3)
