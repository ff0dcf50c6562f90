"""GS201, GS202, GS203, GS206 and GS207 on runs with a known diagnosis."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.analysis.finding import Severity
from gradscope.analysis.rule import SECTIONS, Rule
from gradscope.analysis.rules.gradient_norm_growth import gradient_norm_growth
from gradscope.analysis.rules.gradient_spike import gradient_spike
from gradscope.analysis.rules.loss_diverging import loss_diverging
from gradscope.analysis.rules.loss_not_decreasing import loss_not_decreasing
from gradscope.analysis.rules.loss_oscillating import loss_oscillating
from gradscope.record import Entity
from tests.analysis.courses import (
    TWO_OPTIMIZERS,
    Array,
    course,
    exponential,
    finding_of,
    found,
    learned,
    level,
    normal,
)
from tests.analysis.synthetic import Builder

RULES: tuple[Rule[Any], ...] = (
    gradient_spike,
    loss_diverging,
    loss_not_decreasing,
    loss_oscillating,
    gradient_norm_growth,
)
HEALTHY: dict[str, Callable[[int], Builder]] = {
    "learning": lambda seed: course(2.3 - 0.004 * np.arange(400) + 0.1 * normal(400, seed)),
    "converged": lambda seed: course(
        learned(400, 0.001),
        norms=np.exp(-np.arange(400) / 100) * np.exp(0.5 * normal(400, seed)),
    ),
    "label noise": lambda seed: course(
        1.2 + np.exp(-np.arange(400) / 30) + 0.2 * normal(400, seed)
    ),
    "batches of one": lambda seed: course(
        (0.3 + 2 * np.exp(-np.arange(800) / 100)) * exponential(800, seed),
        norms=exponential(800, seed) ** 2,
    ),
    "warm restarts": lambda seed: course(
        (0.2 + 2 * np.exp(-np.arange(400) / 40))
        * (1 + 1.5 * (np.arange(400) % 100 < 30))
        * (1 + 0.1 * normal(400, seed)),
        norms=(1 + 9 * (np.arange(400) % 100 < 3)) * np.exp(0.1 * normal(400, seed)),
        rates=0.1 * (1 + np.cos(np.pi * (np.arange(400) % 100) / 100)),
    ),
    "two networks against each other": lambda seed: course(
        0.7 + 0.01 * np.arange(400) + 0.1 * normal(400, seed), **TWO_OPTIMIZERS
    ),
    "a loss of both signs": lambda seed: course(0.1 * normal(400, seed)),
    "no measure of progress": lambda seed: course(
        1 + 0.1 * np.arange(400) + normal(400, seed), loss_is_progress=False
    ),
    "a warm-up": lambda seed: course(
        2.3 + 3 * np.exp(-((np.arange(200) - 60) ** 2) / 200) + 0.05 * normal(200, seed),
        rates=np.linspace(1e-5, 1e-2, 200),
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
class TestAnyRun:
    def test_has_a_page(self, rule: Rule[Any]) -> None:
        assert all(rule.section(section) for section in SECTIONS)

    @pytest.mark.parametrize("name", HEALTHY)
    @pytest.mark.parametrize("seed", range(3))
    def test_no_alarm_on_what_is_in_order(self, rule: Rule[Any], name: str, seed: int) -> None:
        assert level(rule, HEALTHY[name](seed).build()) in {None, Severity.INFO}

    @pytest.mark.parametrize("steps", [1, 2, 19])
    def test_is_silent_on_a_beginning(self, rule: Rule[Any], steps: int) -> None:
        assert finding_of(rule, course(10.0 ** np.arange(steps)).build()) is None

    def test_copes_with_nothing_measured(self, rule: Rule[Any]) -> None:
        builder = course(np.full(200, np.nan), norms=np.full(200, np.nan))
        for arrays in builder.arrays.values():
            for values in arrays.values():
                values[:] = np.nan
        assert finding_of(rule, builder.build()) is None

    def test_copes_with_zeros(self, rule: Rule[Any]) -> None:
        assert finding_of(rule, course(np.zeros(200), norms=np.zeros(200)).build()) is None


class TestSpike:
    def outlier(self, times: float = 600, *, shift: float = 0.8, heals: int = 0) -> Builder:
        """One gradient at step 250 of 400; the loss after it is higher, for good or for a while."""
        steps = np.arange(400)
        norms = np.exp(0.1 * normal(400, seed=2))
        norms[250] *= times
        loss = learned(400)
        behind = (steps > 250) & ((steps <= 250 + heals) if heals else True)
        loss[behind] += shift
        return course(loss, norms=norms)

    def test_one_that_the_loss_does_not_get_over(self) -> None:
        builder = self.outlier()
        builder.arrays["parameters"]["grad_norm"][250, 2] *= 3
        finding = found(gradient_spike, builder.build())
        assert finding.severity is Severity.WARNING
        assert finding.span == (250, 250)
        # √(3·¼ + 9·¼) = √3 of what the four parts made before.
        expected = 600 * math.sqrt(3) * math.exp(0.1 * normal(400, seed=2)[250])
        assert finding.evidence[0].observed == pytest.approx(expected, rel=0.03)
        assert "most of all in layers.1.weight" in finding.message
        stayed = re.search(r"has stayed ([\d.]+) above it", finding.message)
        assert stayed
        assert float(stayed.group(1)) == pytest.approx(0.8, rel=0.05)
        assert "batch of step 250" in finding.remedies[0]

    @pytest.mark.parametrize("heals", [3, 30, 70])
    def test_one_that_heals_is_information(self, heals: int) -> None:
        finding = found(gradient_spike, self.outlier(heals=heals).build())
        assert finding.severity is Severity.INFO
        assert "recovered" in finding.message

    @pytest.mark.parametrize(("times", "expected"), [(1.2, False), (8, True)])
    def test_six_deviations_with_a_reaction(self, times: float, expected: bool) -> None:
        run = self.outlier(times=times).build()
        assert (finding_of(gradient_spike, run) is not None) is expected

    @pytest.mark.parametrize(("times", "expected"), [(20, False), (60, True)])
    def test_fifty_times_the_usual_without(self, times: float, expected: bool) -> None:
        run = self.outlier(times=times, shift=0).build()
        assert (finding_of(gradient_spike, run) is not None) is expected

    def test_a_smooth_run_has_a_floor(self) -> None:
        # No noise at all: 5 % are many deviations, and no spike.
        norms = np.ones(400)
        norms[250] = 1.05
        loss = np.where(np.arange(400) > 250, 1.5, 1.0)
        assert finding_of(gradient_spike, course(loss, norms=norms).build()) is None

    def test_a_new_level_is_no_spike(self) -> None:
        norms = np.where(np.arange(400) < 250, 1.0, 100.0)
        assert finding_of(gradient_spike, course(learned(400), norms=norms).build()) is None

    def test_a_learning_rate_that_was_raised_explains_it(self) -> None:
        builder = self.outlier()
        builder.scalars["learning_rate"] = np.where(np.arange(400) < 245, 0.01, 0.1)
        assert finding_of(gradient_spike, builder.build()) is None

    def test_norms_of_all_steps_before_clipping_come_first(self) -> None:
        builder = self.outlier(times=1)
        before = np.ones(400)
        before[300] = 100
        builder.scalars["grad_norm_before_clip"] = before
        finding = found(gradient_spike, builder.build())
        assert finding.span == (300, 300)
        assert finding.evidence[0].quantity == "grad_norm_before_clip / median before"

    @given(exponent=st.floats(-6, 6))
    def test_the_scale_does_not_matter(self, exponent: float) -> None:
        builder = self.outlier()
        builder.scalars["loss"] *= 10**exponent
        builder.arrays["parameters"]["grad_norm"] *= 10**exponent
        assert level(gradient_spike, builder.build()) is Severity.WARNING


class TestDiverging:
    def test_descent_with_too_large_a_step(self) -> None:
        # One dimension, 1.05 times the rate at the edge: the error grows by 1.1 per step.
        loss = 0.5 * 1.1 ** (2 * np.arange(200))
        finding = found(loss_diverging, course(loss).build())
        assert finding.severity is Severity.ERROR
        # The median of the last fifth is the loss of step 179.5, of the first tenth that of 9.5.
        assert finding.evidence[0].observed == pytest.approx(1.1 ** (2 * (179.5 - 9.5)), rel=0.02)
        assert finding.evidence[0].last_step == 199

    def test_a_jump_right_behind_the_first_step(self) -> None:
        loss = 50 + normal(100)
        loss[0] = 2.3
        finding = found(loss_diverging, course(loss).build())
        assert finding.severity is Severity.ERROR
        assert "from 2.3 at first" in finding.message

    @pytest.mark.parametrize(("to", "severity"), [(0.9, None), (1.3, Severity.WARNING)])
    def test_half_of_the_gain_lost_again(self, to: float, severity: Severity | None) -> None:
        loss = np.where(np.arange(400) < 200, learned(400), to + 0.05 * normal(400))
        assert level(loss_diverging, course(loss).build()) is severity

    @pytest.mark.parametrize(("rise", "expected"), [(2.9, False), (3.1, True)])
    def test_the_limit_is_where_it_is_said_to_be(self, rise: float, expected: bool) -> None:
        loss = np.append(np.ones(20), np.full(180, rise))
        assert (finding_of(loss_diverging, course(loss).build()) is not None) is expected

    def test_on_its_way_back_it_is_none(self) -> None:
        loss = 2.3 + 100 * np.exp(-np.arange(200) / 80)
        loss[:10] = 2.3
        assert finding_of(loss_diverging, course(loss).build()) is None

    def test_what_ends_as_nan_is_another_rules(self) -> None:
        builder = course(0.5 * 1.5 ** np.arange(60.0))
        builder.scalars["loss"][-1] = np.nan
        builder.scalars["loss_nonfinite"][-1] = 1
        assert finding_of(loss_diverging, builder.build()) is None

    @given(exponent=st.floats(-6, 6), rise=st.sampled_from([1.0, 10.0]))
    def test_the_scale_does_not_matter(self, exponent: float, rise: float) -> None:
        loss = np.append(np.ones(20), np.full(180, rise)) * (1 + 0.05 * normal(200))
        expected = Severity.ERROR if rise > 1 else None
        assert level(loss_diverging, course(loss * 10**exponent).build()) is expected


class TestNotDecreasing:
    def stuck(self, level: float = 2.3, steps: int = 300, **meta: Any) -> Builder:
        return course(level * (1 + 0.02 * normal(steps)), **meta)

    def graph(self, op: str, classes: int) -> dict[str, Any]:
        nodes = [
            {"op": op, "inputs": [1], "shapes": [[]], "saved": {}},
            {"op": "LogSoftmaxBackward0", "inputs": [], "shapes": [[32, classes]], "saved": {}},
        ]
        return {"graph": {"step": 0, "root": "loss", "nodes": nodes, "truncated": False}}

    def test_it_gets_nowhere(self) -> None:
        finding = found(loss_not_decreasing, self.stuck().build())
        assert finding.severity is Severity.WARNING
        assert "after 300 steps" in finding.message
        # What showed before the last fifth may be the cause.
        assert finding.span == (240, 299)

    def test_the_scale_does_not_matter(self) -> None:
        for exponent in (-6, 6):
            run = self.stuck(2.3 * 10**exponent).build()
            assert level(loss_not_decreasing, run) is Severity.WARNING

    def test_a_slow_start_is_none(self) -> None:
        assert finding_of(loss_not_decreasing, self.stuck(steps=99).build()) is None

    def test_what_falls_is_none(self) -> None:
        assert finding_of(loss_not_decreasing, course(learned(300)).build()) is None

    @pytest.mark.parametrize(("gradient", "expected"), [(0.0, False), (1e-9, True)])
    def test_a_loss_that_asks_for_nothing(self, gradient: float, expected: bool) -> None:
        builder = self.stuck()
        root = builder.entities["modules"][-1]
        builder.entities["modules"][-1] = replace(root, name="(root)")
        builder.set("modules", "output_grad_norm", "(root)", gradient)
        assert (finding_of(loss_not_decreasing, builder.build()) is not None) is expected

    def test_of_two_networks_against_each_other_it_is_information(self) -> None:
        run = self.stuck(**TWO_OPTIMIZERS).build()
        assert level(loss_not_decreasing, run) is Severity.INFO

    @pytest.mark.parametrize(
        ("op", "loss", "expected"),
        [
            # Against ln 10 = 2.3 and ln 2 = 0.69.
            ("NllLossBackward0", 1.2, True),
            ("NllLossBackward0", 1.1, False),
            ("BinaryCrossEntropyWithLogitsBackward0", 0.4, True),
            ("BinaryCrossEntropyWithLogitsBackward0", 0.3, False),
            ("AddBackward0", 0.01, True),
        ],
    )
    def test_a_model_that_is_good_already(self, op: str, loss: float, expected: bool) -> None:
        run = self.stuck(loss, **self.graph(op, 10)).build()
        assert (finding_of(loss_not_decreasing, run) is not None) is expected

    @pytest.mark.parametrize(("loss", "expected"), [(2.1, True), (1.9, False)])
    def test_a_model_that_fits_already(self, loss: float, expected: bool) -> None:
        builder = self.stuck(loss, **self.graph("MseLossBackward0", 1))
        builder.entities["signals"] = [Entity("target", "signal", (32, 1), 32, 0, "signal", "")]
        for quantity in builder.arrays["signals"]:
            builder.arrays["signals"][quantity] = np.full((300, 1), np.nan)
        builder.arrays["signals"]["std"][:] = 2.0
        # A constant would have a squared error of 4.
        assert (finding_of(loss_not_decreasing, builder.build()) is not None) is expected


class TestOscillating:
    def bouncing(self, amplitude: float = 0.5, steps: int = 200) -> Array:
        """A loss that is higher and lower in turn."""
        return np.asarray(1 + amplitude * (-1.0) ** np.arange(steps), dtype=np.float64)

    def test_one_that_gains_nothing(self) -> None:
        finding = found(loss_oscillating, course(self.bouncing()).build())
        assert finding.severity is Severity.WARNING
        assert finding.evidence[0].observed == pytest.approx(0.5)
        assert finding.evidence[1].observed == pytest.approx(-1, abs=0.02)
        assert "swings by 50% of its level, each rise is followed by a fall" in finding.message

    def test_one_that_gets_lower_is_information(self) -> None:
        loss = np.exp(-np.arange(200) / 100) * self.bouncing()
        assert level(loss_oscillating, course(loss).build()) is Severity.INFO

    @pytest.mark.parametrize(("amplitude", "expected"), [(0.09, False), (0.11, True)])
    def test_the_limit_is_where_it_is_said_to_be(self, amplitude: float, expected: bool) -> None:
        loss = self.bouncing(amplitude)
        assert (finding_of(loss_oscillating, course(loss).build()) is not None) is expected

    @pytest.mark.parametrize("seed", range(20))
    def test_noise_is_none(self, seed: int) -> None:
        for loss in (2 + 0.5 * normal(80, seed), exponential(80, seed)):
            assert finding_of(loss_oscillating, course(loss).build()) is None

    def test_of_one_batch_any_swing_counts(self) -> None:
        loss = 1 + 0.5 * np.sin(np.arange(300) * 2 * np.pi / 9)
        for repeated, dropout, expected in (
            (1.0, {}, Severity.WARNING),
            (1.0, {"dropout.0": 0.5}, None),
            (0.0, {}, None),
            (np.nan, {}, None),
        ):
            builder = course(loss, dropout=dropout)
            builder.entities["signals"] = [Entity("input", "signal", (9, 4), 36, 0, "signal", "")]
            for quantity in builder.arrays["signals"]:
                builder.arrays["signals"][quantity] = np.full((300, 1), np.nan)
            builder.arrays["signals"]["repeated"][1:] = repeated
            assert level(loss_oscillating, builder.build()) is expected

    @given(exponent=st.floats(-6, 6))
    def test_the_scale_does_not_matter(self, exponent: float) -> None:
        run = course(self.bouncing() * 10**exponent).build()
        assert level(loss_oscillating, run) is Severity.WARNING


class TestGrowth:
    def growing(self, decades: float, *, steps: int = 200, loss: float = 2.3) -> Builder:
        norms = 10 ** np.linspace(0, decades, steps) * np.exp(0.3 * normal(steps))
        return course(np.linspace(2.3, loss, steps) * (1 + 0.01 * normal(steps)), norms=norms)

    def test_while_the_loss_is_stuck(self) -> None:
        finding = found(gradient_norm_growth, self.growing(2).build())
        assert finding.severity is Severity.WARNING
        # Half of it is done in the sixth of ten blocks of 20 steps.
        assert finding.span == (100, 199)
        # Nine of ten parts of two decades.
        assert finding.evidence[0].observed == pytest.approx(10**1.8, rel=0.2)

    def test_while_the_loss_falls_it_is_information(self) -> None:
        run = self.growing(2, loss=1.0).build()
        assert level(gradient_norm_growth, run) is Severity.INFO

    @pytest.mark.parametrize(("decades", "expected"), [(1.0, False), (1.25, True)])
    def test_the_limit_is_where_it_is_said_to_be(self, decades: float, expected: bool) -> None:
        run = self.growing(decades, steps=1000).build()
        assert (finding_of(gradient_norm_growth, run) is not None) is expected

    def test_a_single_jump_is_no_growth(self) -> None:
        norms = np.where(np.arange(200) < 100, 1.0, 1e3) * np.exp(0.3 * normal(200))
        run = course(np.full(200, 2.3), norms=norms).build()
        assert finding_of(gradient_norm_growth, run) is None

    @given(exponent=st.floats(-6, 6))
    def test_the_scale_does_not_matter(self, exponent: float) -> None:
        builder = self.growing(2)
        builder.scalars["loss"] *= 10**exponent
        builder.arrays["parameters"]["grad_norm"] *= 10**exponent
        assert level(gradient_norm_growth, builder.build()) is Severity.WARNING
