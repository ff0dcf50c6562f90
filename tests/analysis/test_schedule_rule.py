"""GS208 on runs with a known diagnosis."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.learning_rate_collapsed import learning_rate_collapsed
from tests.analysis.asking import reason, said, steps_of
from tests.analysis.synthetic import Builder


def scheduled(rates: NDArray[Any], losses: NDArray[Any], *, follow: bool = True) -> Builder:
    """A run of these rates and losses; updates follow the rate, or do not."""
    builder = steps_of(len(rates), rate=rates, type="SGD")
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
