"""GS006 and GS007 on runs with a known diagnosis."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.gradient_ascent import gradient_ascent
from gradscope.analysis.rules.gradients_not_cleared import gradients_not_cleared
from gradscope.record import Run
from tests.analysis.asking import LAYERS, loop, reason, said, trained_by, weights
from tests.analysis.synthetic import WIDTH, Builder
from tests.analysis.test_depth_rules import STUCK

Vectors = NDArray[np.float64]


def arriving(steps: int, common: float = 0.3, seed: int = 0) -> Vectors:
    """What arrives at the outputs, summed: noise around one direction for each layer."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=(1, LAYERS, WIDTH))
    return common * shared + draw.normal(size=(steps, LAYERS, WIDTH))


def cleared(arrived: Vectors) -> Vectors:
    return arrived


def summed(arrived: Vectors) -> Vectors:
    return np.cumsum(arrived, axis=0)


def summed_and_clipped(arrived: Vectors) -> Vectors:
    """Each step adds to what clipping left of the last."""
    given = np.zeros_like(arrived)
    kept = np.zeros_like(arrived[0])
    for step, new in enumerate(arrived):
        kept = kept + new
        kept = kept * min(1.0, 5.0 / float(np.linalg.norm(kept)))
        given[step] = kept
    return given


def summed_between(every: int) -> Callable[[Vectors], Vectors]:
    """Cleared at each of so many steps alone."""

    def gradients(arrived: Vectors) -> Vectors:
        blocks = [
            np.cumsum(arrived[start : start + every], axis=0)
            for start in range(0, len(arrived), every)
        ]
        return np.concatenate(blocks)

    return gradients


def clipped(arrived: Vectors) -> Vectors:
    norms = np.linalg.norm(arrived, axis=(1, 2), keepdims=True)
    given: Vectors = arrived * np.minimum(1.0, 5.0 / norms)
    return given


def noisy(arrived: Vectors) -> Vectors:
    return arrived + np.random.default_rng(7).normal(0, 2.0, arrived.shape)


def with_momentum(arrived: Vectors) -> Vectors:
    """Momentum written into the gradient."""
    given = arrived.copy()
    for step in range(1, len(arrived)):
        given[step] = 0.9 * given[step - 1] + arrived[step]
    return given


def sharpness_aware(arrived: Vectors) -> Vectors:
    """Two backward passes arrive, of nearly the same gradient, and the second is stepped on."""
    return arrived * 0.5 + np.random.default_rng(3).normal(0, 0.05, arrived.shape)


def negated(arrived: Vectors) -> Vectors:
    return -arrived


def balanced(builder: Builder, gradients: Callable[[Vectors], Vectors], arrived: Vectors) -> Run:
    """The run in which this arrived at the layers, and these were the biases' gradients."""
    return recorded(builder, gradients(arrived), arrived).build()


def recorded(builder: Builder, given: Vectors, arrived: Vectors) -> Builder:
    lengths, whole = np.linalg.norm(given, axis=2), np.linalg.norm(arrived, axis=2)
    inner = (given * arrived).sum(axis=2)
    previous = np.full(lengths.shape, np.nan)
    previous[1:] = (given[1:] * given[:-1]).sum(axis=2) / lengths[1:] / lengths[:-1]
    for layer in range(LAYERS):
        name = f"layers.{layer}.bias"
        for quantity, values in (
            ("grad_norm", lengths),
            ("grad_balance", inner / whole**2),
            ("grad_balance_cosine", inner / whole / lengths),
            ("grad_previous_cosine", previous),
        ):
            builder.set("parameters", quantity, name, values[:, layer])
    return builder


class TestGradientsNotCleared:
    @pytest.mark.parametrize("gradients", [summed, summed_and_clipped, summed_between(10)])
    @pytest.mark.parametrize("common", [0.0, 0.3, 30.0])
    def test_what_is_never_cleared(
        self, gradients: Callable[[Vectors], Vectors], common: float
    ) -> None:
        run = balanced(loop(), gradients, arriving(60, common))
        finding = said(run, gradients_not_cleared)
        if common > 1 and gradients is summed_and_clipped:
            # All of them in one direction: a multiple of what arrived tells nothing.
            assert finding is None
            return
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert finding.evidence[0].observed > 0.8
        assert "zero_grad" in finding.remedies[0]

    def test_how_long_the_sum_has_become(self) -> None:
        # Ten gradients of one direction make one of ten times the length.
        run = balanced(loop(), summed_between(10), arriving(60, 1e3))
        finding = said(run, gradients_not_cleared)
        assert finding is not None
        assert "up to 10 times as long" in finding.message

    def test_a_stuck_loss_makes_it_an_error(self) -> None:
        finding = said(balanced(loop(loss=STUCK), summed, arriving(60)), gradients_not_cleared)
        assert finding is not None
        assert finding.severity is Severity.ERROR

    @pytest.mark.parametrize(
        "gradients", [cleared, clipped, noisy, with_momentum, sharpness_aware, negated]
    )
    @pytest.mark.parametrize("common", [0.0, 0.3, 3.0, 100.0, 1e4])
    def test_what_is_cleared(self, gradients: Callable[[Vectors], Vectors], common: float) -> None:
        # Up to the same gradient at every step, as in full batches that stand still.
        run = balanced(loop(loss=STUCK), gradients, arriving(60, common))
        assert said(run, gradients_not_cleared) is None

    def test_a_blow_up_is_no_sum(self) -> None:
        # Beside what is many times as long, the gradient before can't be seen.
        arrived = arriving(20) * 50.0 ** np.arange(20)[:, None, None]
        run = balanced(loop(20, loss=STUCK), cleared, arrived)
        assert said(run, gradients_not_cleared) is None

    def test_a_bias_in_front_of_a_norm_has_no_say(self) -> None:
        arrived = arriving(60)
        builder = recorded(loop(), summed(arrived), arrived)
        for quantity, value in (("grad_norm", 1e-9), ("grad_balance", 0.01)):
            builder.set("parameters", quantity, "layers.1.bias", value)
        whole = said(builder.build(), gradients_not_cleared)
        assert whole is not None
        assert whole.evidence[0].observed == 1.0

    def test_steps_that_do_not_follow_each_other_can_t_be_compared(self) -> None:
        builder = recorded(loop(), summed(arriving(60)), arriving(60))
        builder.steps = builder.steps * 2
        assert "could be held against" in reason(builder.build(), gradients_not_cleared)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        arrived = arriving(20) * 10**scale
        builder = recorded(loop(20), summed(arrived), arrived)
        builder.scalars["loss"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), gradients_not_cleared)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert finding.evidence[0].observed == pytest.approx(1.0)


class TestGradientAscent:
    def test_gradients_that_were_negated(self) -> None:
        run = balanced(loop(loss=(2.3, 9.0)), negated, arriving(60))
        finding = said(run, gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert finding.evidence[0].observed == pytest.approx(-1.0)

    def test_and_clipped(self) -> None:
        run = balanced(loop(loss=(2.3, 9.0)), lambda a: negated(clipped(a)), arriving(60))
        finding = said(run, gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR

    def test_a_loss_that_falls_all_the_same_makes_it_information(self) -> None:
        finding = said(balanced(loop(), negated, arriving(60)), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_negated_and_maximized_is_descent(self) -> None:
        builder = recorded(loop(**trained_by(maximize=True)), -arriving(60), arriving(60))
        assert said(builder.build(), gradient_ascent) is None

    def test_a_branch_that_is_reversed_is_a_technique(self) -> None:
        given = arriving(60)
        given[:, 0] *= -1
        builder = recorded(loop(loss=(2.3, 9.0)), given, arriving(60))
        assert said(builder.build(), gradient_ascent) is None

    @pytest.mark.parametrize("gradients", [cleared, clipped, noisy, summed])
    def test_a_gradient_with_its_own_sign(self, gradients: Callable[[Vectors], Vectors]) -> None:
        run = balanced(loop(loss=(2.3, 9.0)), gradients, arriving(60))
        assert said(run, gradient_ascent) is None

    def test_steps_along_the_gradient(self) -> None:
        builder = loop(loss=(2.3, 9.0))
        builder.arrays["parameters"]["update_gradient_cosine"][:] = 1.0
        finding = said(builder.build(), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "from 2.3" in finding.message

    def test_that_were_asked_for(self) -> None:
        builder = loop(loss=(2.3, 9.0), **trained_by(maximize=True))
        builder.arrays["parameters"]["update_gradient_cosine"][:] = 1.0
        finding = said(builder.build(), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.INFO
        assert "maximize=True" in finding.message

    @pytest.mark.parametrize(
        ("begin", "cosine", "end"),
        [
            # Momentum: downhill at first, then carried on.
            (-1.0, 0.5, 9.0),
            # At a right angle: what noise does.
            (0.05, 0.05, 9.0),
            # The loss falls.
            (0.5, 0.5, 1.8),
        ],
    )
    def test_steps_that_go_uphill_for_a_while(
        self, begin: float, cosine: float, end: float
    ) -> None:
        builder = loop(loss=(2.3, end))
        builder.arrays["parameters"]["update_gradient_cosine"][:] = cosine
        builder.arrays["parameters"]["update_gradient_cosine"][0] = begin
        assert said(builder.build(), gradient_ascent) is None

    def test_weight_decay_goes_where_the_weights_are(self) -> None:
        # A change of 1e-3 of the weights, all of it decay.
        decay = trained_by(type="AdamW", weight_decay=1.0)
        builder = loop(loss=(2.3, 9.0), **decay)
        builder.scalars["learning_rate"][:] = 1e-3
        builder.arrays["parameters"]["update_gradient_cosine"][:] = 0.5
        assert said(builder.build(), gradient_ascent) is None
        builder.scalars["learning_rate"][:] = 1e-5
        assert said(builder.build(), gradient_ascent) is not None

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        arrived = arriving(30) * 10**scale
        builder = recorded(loop(30, loss=(2.3, 9.0)), -arrived, arrived)
        builder.scalars["loss"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR


class TestNegatedLoss:
    """Four layers whose steps promise 0.0045 each, by ⟨g, Δw⟩."""

    def run(self, end: float, turn: float = 0.5, moved: float = 1.0) -> Run:
        builder = loop(100, loss=(2.3, end))
        for name in weights(builder):
            builder.set("parameters", "grad_previous_cosine", name, turn)
        builder.arrays["parameters"]["update_norm"] *= moved
        return builder.build()

    def test_a_loss_that_rises_by_what_it_should_have_fallen(self) -> None:
        found = said(self.run(2.75), gradient_ascent)
        assert found is not None
        assert found.severity is Severity.ERROR
        promised = 99 * 4 * (1e-3 * 2**0.5 * 8) * 0.1
        assert f"should have lowered the loss by {promised:.3g}" in found.message
        assert "(-loss).backward()" in found.remedies[0]

    def test_a_rise_at_once_has_another_cause(self) -> None:
        run = self.run(2.3)
        losses = run.scalars["loss"] + np.where(run.steps < 60, 0.0, 0.5)
        run = replace(run, scalars={**run.scalars, "loss": losses})
        assert said(run, gradient_ascent) is None

    @pytest.mark.parametrize(
        ("end", "turn", "moved"),
        [
            (1.9, 0.5, 1.0),  # it falls, as promised
            (2.4, 0.5, 1.0),  # … rises by less than half of that
            (2.75, -0.5, 1.0),  # steps overshoot: the gradient turns round
            (2.75, 0.0, 1.0),  # … or says nothing from one batch to the next
            (2.75, 0.5, 300.0),  # steps too large to promise anything
        ],
    )
    def test_what_is_not_ascent(self, end: float, turn: float, moved: float) -> None:
        assert said(self.run(end, turn, moved), gradient_ascent) is None
