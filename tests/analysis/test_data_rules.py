"""GS601, GS602, GS606 and GS607 on signals with a known diagnosis."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.analysis.rules.constant_target import constant_target
from gradscope.analysis.rules.invalid_input import invalid_input
from gradscope.analysis.rules.unscaled_input import unscaled_input
from gradscope.analysis.rules.unscaled_target import unscaled_target
from gradscope.record import Run
from tests.analysis.heads import LABELS, headed, signalled
from tests.analysis.synthetic import Builder, Chain

LEARNING, STUCK, CONVERGED = (2.3, 1.6), (2.31, 2.305), (2.3, -0.1)
RAW = {"rms": 210.0, "feature_std_min": 0.2, "feature_std_max": 300.0}
PIXELS = {"rms": 8.0, "feature_std_min": 0.05, "feature_std_max": 6.0}
STANDARD = {"rms": 1.0, "feature_std_min": 0.8, "feature_std_max": 1.2}
CLASSES = nn.Linear(5, 10)


def found(rule: Rule[Any], run: Run) -> list[Finding]:
    report = analyze(run, rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    return list(report.findings)


def classifier(loss: tuple[float, float] = LEARNING, **meta: Any) -> Builder:
    builder = headed(CLASSES, lambda z: F.cross_entropy(z, LABELS), loss=loss, **meta)
    builder.scalars["loss"][0] = loss[0]
    return builder


def regression(loss: tuple[float, float] = STUCK) -> Builder:
    return headed(nn.Linear(5, 1), lambda z: F.mse_loss(z, torch.zeros(8, 1)), loss=loss)


class TestUnscaledInput:
    def fed(self, builder: Builder, **scales: float) -> Builder:
        # What the first layer makes of it by PyTorch's initialization.
        first = builder.entities["modules"][0].name
        builder.set("modules", "output_rms", first, 0.58 * scales["rms"])
        return signalled(builder, "input", (8, 13), **scales)

    @pytest.mark.parametrize(
        ("scales", "quantity", "observed"),
        [
            (RAW, "feature_std_max / feature_std_min", 1500.0),
            (RAW | {"feature_std_min": math.nan}, "rms", 210.0),
            ({"rms": 1.8e-3}, "rms", 1.8e-3),
        ],
    )
    def test_a_stuck_loss(self, scales: dict[str, float], quantity: str, observed: float) -> None:
        (finding,) = found(unscaled_input, self.fed(classifier(STUCK), **scales).build())
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.0"
        assert finding.evidence[0].quantity == quantity
        assert finding.evidence[0].observed == pytest.approx(observed, rel=1e-6)
        twice = "second scaling" in finding.remedies[0]
        assert twice is (observed < 1)

    @pytest.mark.parametrize("fall", [LEARNING, CONVERGED, STUCK])
    @pytest.mark.parametrize("scales", [PIXELS, STANDARD])
    def test_pixels_and_standardized_features_are_in_order(
        self, scales: dict[str, float], fall: tuple[float, float]
    ) -> None:
        assert found(unscaled_input, self.fed(classifier(fall), **scales).build()) == []

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        # A straight line lies at end + (start - end) / 10 in its last fifth.
        [(50.0, 0.0, True), (50.0, -5.5, False), (6.0, 1.0, False)],
    )
    def test_a_start_far_above_a_guess_that_it_did_not_get_over(
        self, start: float, end: float, expected: bool
    ) -> None:
        run = self.fed(classifier((start, end)), **RAW).build()
        findings = found(unscaled_input, run)
        assert [finding.severity for finding in findings] == [Severity.WARNING] * expected
        if expected:
            assert "21.7 times a guess's" in findings[0].message

    @pytest.mark.parametrize(("share", "expected"), [(0.45, False), (0.55, True)])
    def test_units_dead_from_the_start(self, share: float, expected: bool) -> None:
        builder = self.fed(classifier(), **RAW)
        builder.set("modules", "dead_unit_fraction", "layers.0.act", share)
        findings = found(unscaled_input, builder.build())
        assert [finding.severity for finding in findings] == [Severity.WARNING] * expected
        if expected:
            assert "55% of the units of layers.0.act" in findings[0].message

    def test_without_harm_it_is_silent(self) -> None:
        for scales in (RAW, {"rms": 1e-3}):
            assert found(unscaled_input, self.fed(classifier(), **scales).build()) == []

    @pytest.mark.parametrize("group", ["norm", "embedding"])
    def test_a_first_layer_that_scales_or_looks_up(self, group: str) -> None:
        builder = self.fed(classifier(STUCK), **RAW)
        modules = builder.entities["modules"]
        modules[0] = replace(modules[0], group=group)
        assert found(unscaled_input, builder.build()) == []

    def test_a_model_that_scales_its_input_itself(self) -> None:
        builder = self.fed(classifier(STUCK), **RAW)
        builder.set("modules", "output_rms", "layers.0", 0.6)
        assert found(unscaled_input, builder.build()) == []

    def test_integers_are_not_judged(self) -> None:
        builder = self.fed(classifier(STUCK), **RAW)
        signals = builder.entities["signals"]
        signals[0] = replace(signals[0], type="int64")
        assert found(unscaled_input, builder.build()) == []

    @given(st.integers(0, 99), st.floats(1e-3, 1e3))
    def test_neither_the_columns_order_nor_the_loss_scale_matter(
        self, seed: int, factor: float
    ) -> None:
        builder = self.fed(classifier(STUCK), **RAW).shuffled(seed)
        builder.scalars["loss"] *= factor
        (finding,) = found(unscaled_input, builder.build())
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.0"


class TestUnscaledTarget:
    def aimed(self, builder: Builder, target: float, output: float = 0.3) -> Builder:
        signalled(builder, "output", (8, 1), rms=output)
        return signalled(builder, "target", (8, 1), rms=target, mean=target / 2, std=target / 2)

    @pytest.mark.parametrize("meta", [{}, {"criterion": "MSELoss", "graph": None}])
    def test_a_loss_that_does_not_move(self, meta: dict[str, object]) -> None:
        builder = self.aimed(regression(), 1e5)
        builder.meta |= meta
        (finding,) = found(unscaled_target, builder.build())
        assert finding.severity is Severity.ERROR
        assert finding.evidence[0].observed == pytest.approx(1e5 / 0.3, rel=1e-6)
        assert "(target - 50,000) / 50,000" in finding.remedies[0]
        # The next power of ten above 333,333.
        assert "of SGD by 1e6." in finding.remedies[1]

    def test_large_steps_are_told(self) -> None:
        builder = self.aimed(regression(), 1e5)
        builder.arrays["parameters"]["update_norm"] *= 200
        (finding,) = found(unscaled_target, builder.build())
        assert "steps of up to 0.2 times a weight" in finding.message

    @pytest.mark.parametrize(
        ("target", "output", "expected"),
        # A last layer that starts at zero is no measure: standardized targets are in order.
        [(29.0, 0.3, False), (31.0, 0.3, True), (1.0, 0.0, False), (11.0, 0.0, True)],
    )
    def test_the_limit_is_a_hundredfold(self, target: float, output: float, expected: bool) -> None:
        findings = found(unscaled_target, self.aimed(regression(), target, output).build())
        assert bool(findings) is expected

    @pytest.mark.parametrize(("output", "expected"), [(-100.0, True), (100.0, False)])
    def test_outputs_that_are_still_on_their_way(self, output: float, expected: bool) -> None:
        # The targets have a mean of 5e4 and a σ of 5e4.
        builder = self.aimed(regression(LEARNING), 1e5)
        builder.set("signals", "mean", "output", output)
        findings = found(unscaled_target, builder.build())
        assert [finding.severity for finding in findings] == [Severity.WARNING] * expected

    def test_what_arrives_is_not_harmed(self) -> None:
        builder = self.aimed(regression(CONVERGED), 1e5)
        builder.set("signals", "mean", "output", -1e4)
        assert found(unscaled_target, builder.build()) == []
        builder = self.aimed(regression(LEARNING), 1e5)
        assert found(unscaled_target, builder.build()) == []

    def test_class_indices_have_no_scale(self) -> None:
        assert found(unscaled_target, self.aimed(classifier(STUCK), 5e4).build()) == []


class TestConstantTarget:
    def labelled(self, builder: Builder, value: Any, shape: tuple[int, ...] = (8,)) -> Builder:
        return signalled(builder, "target", shape, distinct=1, mean=value, min=value, max=value)

    @pytest.mark.parametrize("value", [0.0, 3.0])
    def test_one_class_for_all(self, value: float) -> None:
        (finding,) = found(constant_target, self.labelled(classifier(), value).build())
        assert finding.severity is Severity.ERROR
        assert f"class {value:.0f}" in finding.message
        assert (finding.evidence[0].first_step, finding.evidence[0].last_step) == (0, 99)

    def test_one_number_for_all_but_a_residual_of_zero(self) -> None:
        (finding,) = found(constant_target, self.labelled(regression(), 7.0).build())
        assert finding.severity is Severity.WARNING
        assert found(constant_target, self.labelled(regression(), 0.0).build()) == []

    def test_data_that_come_sorted_change_at_some_time(self) -> None:
        values = np.repeat([0.0, 1.0], 50)
        assert found(constant_target, self.labelled(classifier(), values).build()) == []

    def test_a_second_value_in_one_batch_is_enough(self) -> None:
        builder = self.labelled(classifier(), 1.0)
        builder.arrays["signals"]["distinct"][40] = 2
        assert found(constant_target, builder.build()) == []

    @pytest.mark.parametrize(
        "meta",
        [
            {"loss_is_progress": False},
            {"coverage": {"optimizers": [{"type": "Adam"}, {"type": "Adam"}]}},
        ],
    )
    def test_labels_of_a_gan_are_meant(self, meta: dict[str, Any]) -> None:
        assert found(constant_target, self.labelled(classifier(**meta), 1.0).build()) == []

    @pytest.mark.parametrize(("samples", "known"), [(7, 100), (8, 4)])
    def test_few_say_nothing(self, samples: int, known: int) -> None:
        builder = self.labelled(classifier(), 1.0, (samples,))
        builder.arrays["signals"]["distinct"][known:] = math.nan
        (skip,) = analyze(builder.build(), rules=[constant_target]).skipped
        assert "are needed" in skip.reason


class TestInvalidInput:
    def broken(self, name: str, at: int, *, loss: slice, gradients: slice) -> Builder:
        counts = np.zeros(100)
        counts[at] = 3
        builder = signalled(classifier(), name, (8, 5), nonfinite=counts)
        builder.scalars["loss"][loss] = math.nan
        builder.scalars["loss_nonfinite"][loss] = 1
        builder.arrays["parameters"]["grad_nonfinite"][gradients] = 1
        return builder

    @pytest.mark.parametrize("name", ["input", "target"])
    @pytest.mark.parametrize(("until", "severity"), [(100, "error"), (42, "warning"), (40, "info")])
    def test_what_broke_since_is_the_harm(self, name: str, until: int, severity: str) -> None:
        stretch = slice(40, until)
        run = self.broken(name, 40, loss=stretch, gradients=stretch).build()
        (finding,) = found(invalid_input, run)
        assert finding.severity.value == severity
        assert f"The {name} held 3 NaN or infinite entries at step 40" in finding.message
        assert (finding.evidence[0].entity, finding.evidence[0].first_step) == (name, 40)

    def test_what_broke_before_is_not_its_harm(self) -> None:
        stretch = slice(10, 20)
        run = self.broken("input", 40, loss=stretch, gradients=stretch).build()
        (finding,) = found(invalid_input, run)
        assert finding.severity is Severity.INFO

    @pytest.mark.parametrize(
        ("values", "quantity", "expected"),
        [
            ({"min": 0, "max": 9}, "max", False),
            ({"min": 0, "max": 10}, "max", True),
            ({"min": -1, "max": 9}, "min", True),
            # What is passed over.
            ({"min": -100, "max": 9}, "min", False),
        ],
    )
    def test_class_indices(self, values: dict[str, float], quantity: str, expected: bool) -> None:
        builder = signalled(classifier(), "target", (8,), nonfinite=0, **values)
        findings = found(invalid_input, builder.build())
        assert [finding.evidence[0].quantity for finding in findings] == [quantity] * expected
        if expected:
            assert findings[0].severity is Severity.ERROR
            assert "10 classes, from 0 to 9" in findings[0].message

    def test_an_index_that_is_passed_over_may_lie_beyond(self) -> None:
        for ignored, expected in ((255, False), (-100, True)):
            passes_over = partial(F.cross_entropy, target=LABELS, ignore_index=ignored)
            builder = headed(CLASSES, passes_over)
            signalled(builder, "target", (8,), nonfinite=0, min=0, max=255)
            assert bool(found(invalid_input, builder.build())) is expected

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0, 1, False), (-1, 1, True), (1, 2, True), (0, 1.0004, False)],
    )
    @pytest.mark.parametrize(("fall", "severity"), [(LEARNING, "warning"), ((0.7, -90), "error")])
    def test_labels_beyond_what_a_binary_loss_has_a_value_for(
        self,
        low: float,
        high: float,
        expected: bool,
        fall: tuple[float, float],
        severity: str,
    ) -> None:
        builder = headed(
            CLASSES,
            lambda z: F.binary_cross_entropy_with_logits(z, torch.ones(8, 10)),
            loss=fall,
        )
        signalled(builder, "target", (8, 10), nonfinite=0, min=low, max=high)
        findings = found(invalid_input, builder.build())
        assert [finding.severity.value for finding in findings] == [severity] * expected

    def test_clean_data_are_silent(self) -> None:
        builder = signalled(classifier(STUCK), "input", (8, 5), nonfinite=0)
        signalled(builder, "target", (8,), nonfinite=0, min=0, max=9)
        assert found(invalid_input, builder.build()) == []
        assert found(invalid_input, Chain().run()) == []
