"""GS301 and GS302 on runs with a known diagnosis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.analysis.finding import Severity
from tests.analysis.synthetic import Builder, Chain, asked
from tests.analysis.test_depth_rules import STUCK, findings

LEARNING = (2.3, 1.0)
# A straight line, whose last fifth lies around 0.05.
CONVERGED = (2.3, -0.2)
# 256 samples are 8 batches of 32: the first share of dead units is that of the eighth.
WINDOW = 8


def dying(builder: Builder, layer: int, share: float, *, at: int = 0) -> Builder:
    """The share of the layer's units is silent from the step `at` on, seen a window later."""
    values = np.zeros(len(builder.steps))
    values[: WINDOW - 1] = np.nan
    # What was silent from the start is dead at the first measurement.
    values[at + WINDOW - 1 :] = share
    return builder.set("modules", "dead_unit_fraction", f"layers.{layer}.act", values)


def cut_off(builder: Builder, until: int, *, at: int = 0) -> Builder:
    """The weights up to this layer get a gradient of exactly zero from a step on."""
    for layer in range(until + 1):
        values = np.full(len(builder.steps), 0.1)
        values[at:] = 0
        builder.set("parameters", "grad_norm", f"layers.{layer}.weight", values)
    return builder


class TestDeadRelu:
    def test_too_few_inputs_are_no_fault_of_the_measurement(self) -> None:
        builder = Chain(steps=7).builder()
        builder.arrays["modules"]["dead_unit_fraction"][:] = np.nan
        (skip,) = (s for s in asked(builder.build()).skipped if s.code == "GS301")
        assert "too few inputs were recorded: 256" in skip.reason
        # Without a rectifier there is nothing to wait for.
        smooth = Chain(steps=7, activation="GELU").builder()
        smooth.arrays["modules"]["dead_unit_fraction"][:] = np.nan
        assert "GS301" not in {s.code for s in asked(smooth.build()).skipped}

    def test_a_layer_dead_from_the_start_explains_the_zero_gradients(self) -> None:
        chain = Chain(layers=4, loss=STUCK)
        report = asked(cut_off(dying(chain.builder(), 2, 1.0), 2).build())
        assert [f.code for f in report.findings] == ["GS301", "GS003"]
        dead, zero = report.findings
        assert dead.severity is Severity.ERROR
        assert dead.layer == "layers.2.act"
        assert "All units of layers.2.act are dead" in dead.message
        assert "from the first step on" in dead.message
        assert "kaiming" in dead.remedies[0]
        evidence = dead.evidence[0]
        assert (evidence.quantity, evidence.entity) == ("dead_unit_fraction", "layers.2.act")
        assert (evidence.first_step, evidence.last_step) == (0, 99)
        assert (evidence.observed, evidence.limit) == (1.0, 0.5)
        assert zero.explained_by == ("GS301",)

    def test_says_when_they_died_and_after_which_update(self) -> None:
        builder = dying(Chain(layers=4).builder(), 2, 0.97, at=33)
        column = builder.at("parameters", "layers.1.weight")
        parameters = builder.arrays["parameters"]
        parameters["update_norm"][32, column] = 0.4 * parameters["weight_norm"][32, column]
        finding = findings(builder.build())["GS301"]
        assert "between step 32 and step 33" in finding.message
        assert "0.4 times a weight" in finding.message
        assert "learning rate" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("fall", "severity"), [(STUCK, Severity.ERROR), (LEARNING, Severity.WARNING)]
    )
    def test_a_dead_layer_that_cuts_off_the_rest_is_harm(
        self, fall: tuple[float, float], severity: Severity
    ) -> None:
        builder = cut_off(dying(Chain(layers=4, loss=fall).builder(), 1, 1.0), 1)
        assert findings(builder.build())["GS301"].severity is severity

    def test_half_a_layer_cuts_nothing_off(self) -> None:
        # What zeroes the gradients here is something else, and stays a root.
        builder = cut_off(dying(Chain(layers=4).builder(), 1, 0.6), 1)
        found = findings(builder.build())
        assert found["GS301"].severity is Severity.INFO
        assert found["GS003"].explained_by == ()

    def test_a_dead_branch_is_information(self) -> None:
        # The layers before it learn: the gradient takes another way.
        builder = dying(Chain(layers=4).builder(), 1, 1.0)
        finding = findings(builder.build())["GS301"]
        assert finding.severity is Severity.INFO
        assert "no weight before it" not in finding.message

    @pytest.mark.parametrize(
        ("share", "expected"),
        [(0.45, None), (0.5, Severity.INFO), (0.89, Severity.INFO), (0.91, Severity.ERROR)],
    )
    def test_the_limits_are_where_they_are_said_to_be(
        self, share: float, expected: Severity | None
    ) -> None:
        found = findings(dying(Chain(layers=4, loss=STUCK).builder(), 1, share).build())
        assert (found["GS301"].severity if found else None) is expected

    @pytest.mark.parametrize("activation", ["LeakyReLU", "GELU", "Sigmoid"])
    def test_what_is_never_exactly_zero_by_nature_is_not_judged(self, activation: str) -> None:
        chain = Chain(layers=4, loss=STUCK, activation=activation)
        report = asked(dying(chain.builder(), 1, 1.0).build())
        assert report.findings == ()
        assert "GS301" not in {skip.code for skip in report.skipped}

    @pytest.mark.parametrize(("length", "expected"), [(18, False), (19, True)])
    def test_lasting_is_a_fifth_of_what_was_measured(self, length: int, expected: bool) -> None:
        # 93 of 100 steps have a share; a fifth of them is 18.6.
        builder = dying(Chain(layers=4).builder(), 1, 0.95, at=100 - length - WINDOW + 1)
        assert ("GS301" in findings(builder.build())) is expected

    def test_units_that_came_back_are_alive(self) -> None:
        builder = dying(Chain(layers=4, loss=STUCK).builder(), 1, 1.0)
        builder.arrays["modules"]["dead_unit_fraction"][95:] = 0.1
        assert findings(builder.build()) == {}

    def test_what_comes_to_a_loss_that_was_stuck_before_did_not_make_it_stick(self) -> None:
        for at, severity in ((5, Severity.ERROR), (60, Severity.INFO)):
            builder = dying(Chain(layers=4, loss=STUCK).builder(), 1, 0.95, at=at)
            assert findings(builder.build())["GS301"].severity is severity

    def test_where_no_activation_was_seen_that_is_said(self) -> None:
        builder = Chain(layers=4).builder()
        builder.entities["modules"] = [
            replace(entity, group="other") for entity in builder.entities["modules"]
        ]
        reasons = {skip.code: skip.reason for skip in asked(builder.build()).skipped}
        for code in ("GS301", "GS302"):
            assert "no activation was seen" in reasons[code]

    @given(seed=st.integers(0, 100), exponent=st.floats(-6, 6))
    def test_neither_order_nor_scale_of_the_loss_matters(self, seed: int, exponent: float) -> None:
        def builder() -> Builder:
            return cut_off(dying(Chain(layers=4, loss=STUCK).builder(), 2, 1.0, at=3), 2, at=3)

        whole = findings(builder().build())["GS301"]
        assert findings(builder().shuffled(seed).build())["GS301"] == whole
        scaled = builder()
        for table, quantity in (("parameters", "grad_norm"), ("modules", "output_grad_norm")):
            scaled.arrays[table][quantity] *= 10**exponent
        scaled.scalars["loss"] *= 10**exponent
        found = findings(scaled.build())["GS301"]
        assert (found.severity, found.evidence) == (whole.severity, whole.evidence)


def saturating(builder: Builder, *layers: int, share: float = 0.9, since: int = 0) -> Builder:
    """That share of the layers' outputs is saturated from a step on."""
    for layer in layers:
        values = np.full(len(builder.steps), 0.05)
        values[since:] = share
        builder.set("modules", "output_saturated_fraction", f"layers.{layer}.act", values)
    return builder


class TestSaturatedActivation:
    @pytest.mark.parametrize(
        ("fall", "severity"),
        [
            (STUCK, Severity.ERROR),
            (LEARNING, Severity.WARNING),
            (CONVERGED, Severity.INFO),
        ],
    )
    def test_from_the_first_step_on(self, fall: tuple[float, float], severity: Severity) -> None:
        chain = Chain(layers=4, activation="Tanh", loss=fall)
        finding = findings(saturating(chain.builder(), 0, 1).build())["GS302"]
        assert finding.severity is severity
        assert finding.layer == "layers.0.act"
        assert "90% of the outputs of layers.0.act (and of 1 other layer)" in finding.message
        assert "from the first step on" in finding.message
        assert "xavier" in finding.remedies[0]
        evidence = finding.evidence[0]
        assert (evidence.quantity, evidence.entity) == (
            "output_saturated_fraction",
            "layers.0.act",
        )
        assert (evidence.first_step, evidence.last_step, evidence.limit) == (0, 99, 0.5)
        assert evidence.observed == pytest.approx(0.9)

    @pytest.mark.parametrize(
        ("share", "expected"),
        [(0.45, None), (0.55, Severity.INFO), (0.74, Severity.INFO), (0.76, Severity.WARNING)],
    )
    def test_the_limits_are_where_they_are_said_to_be(
        self, share: float, expected: Severity | None
    ) -> None:
        builder = Chain(layers=4, activation="Tanh").builder()
        found = findings(saturating(builder, 1, share=share).build())
        assert (found["GS302"].severity if found else None) is expected

    def test_what_training_saturates_is_information_and_late_is_nothing(self) -> None:
        for since, expected in ((40, True), (60, False)):
            builder = saturating(Chain(layers=4, activation="Tanh").builder(), 1, since=since)
            found = findings(builder.build())
            assert ("GS302" in found) is expected
        builder = saturating(Chain(layers=4, activation="Tanh").builder(), 1, since=40)
        finding = findings(builder.build())["GS302"]
        assert finding.severity is Severity.INFO
        assert "since step 40" in finding.message
        assert "learning rate" in finding.remedies[0]

    def test_what_comes_to_a_loss_that_was_stuck_before_did_not_make_it_stick(self) -> None:
        for since, severity in ((5, Severity.ERROR), (45, Severity.INFO)):
            chain = Chain(layers=4, activation="Tanh", loss=STUCK)
            finding = findings(saturating(chain.builder(), 1, since=since).build())["GS302"]
            assert finding.severity is severity

    def test_the_output_s_activation_is_not_judged(self) -> None:
        chain = Chain(layers=4, activation="Sigmoid", loss=STUCK)
        assert findings(saturating(chain.builder(), 3).build()) == {}
        assert "GS302" in findings(saturating(chain.builder(), 2).build())

    def test_a_sigmoid_beside_other_activations_is_a_gate(self) -> None:
        builder = saturating(Chain(layers=4, activation="Sigmoid", loss=STUCK).builder(), 1)
        entities = builder.entities["modules"]
        at = builder.at("modules", "layers.0.act")
        entities[at] = replace(entities[at], type="SiLU")
        assert findings(builder.build()) == {}

    def test_behind_frozen_layers_nothing_is_lost(self) -> None:
        builder = saturating(Chain(layers=4, activation="Tanh", loss=STUCK).builder(), 0)
        builder.arrays["parameters"]["requires_grad"][:, :2] = 0
        assert findings(builder.build()) == {}

    def test_large_inputs_are_named(self) -> None:
        builder = saturating(Chain(layers=4, activation="Tanh").builder(), 0)
        signal = replace(builder.entities["modules"][0], name="input", kind="signal")
        builder.entities["signals"] = [signal]
        for quantity in builder.arrays["signals"]:
            builder.arrays["signals"][quantity] = np.full((100, 1), 4700.0)
        assert "rms is 4,700" in findings(builder.build())["GS302"].remedies[0]

    def test_the_scale_of_the_weights_explains_it_and_it_the_vanishing(self) -> None:
        chain = Chain(factor=4.0, scale=4.0, activation="Tanh", loss=(9.0, 9.0))
        report = asked(saturating(chain.builder(), 1, 2).build())
        assert [f.code for f in report.findings] == ["GS104", "GS102", "GS302"]
        assert report.findings[2].explained_by == ("GS104", "GS102")
        faded = Chain(factor=0.15, activation="Tanh", loss=STUCK)
        report = asked(saturating(faded.builder(), *range(11)).build())
        assert [(f.code, f.explained_by) for f in report.findings] == [
            ("GS302", ()),
            ("GS101", ("GS302",)),
        ]
