"""GS502 to GS506, and what GS501 and GS503 say of the cause, on runs with a known diagnosis."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.half_precision_overflow import half_precision_overflow
from gradscope.analysis.rules.half_precision_underflow import half_precision_underflow
from gradscope.analysis.rules.loss_scale_collapse import loss_scale_collapse
from gradscope.analysis.rules.non_finite_activation import non_finite_activation
from gradscope.analysis.rules.non_finite_gradient import non_finite_gradient
from gradscope.analysis.rules.non_finite_loss import non_finite_loss
from tests.analysis.additions import add, graph_of
from tests.analysis.synthetic import Builder, Chain
from tests.analysis.test_collapse_rules import poor
from tests.analysis.test_depth_rules import STUCK
from tests.analysis.test_structure_rules import LEARNING, found

Fall = tuple[float, float]
STEPS = np.arange(100)
CONVERGED = (2.3, -0.2)
# No loss was logged.
UNSEEN = (np.nan, np.nan)


def broken(at: int = 40, layer: int = 5, *, reaches: bool = True, until: int = 100) -> Builder:
    """From a step on the outputs from this layer on are NaN, and with them all gradients."""
    builder = Chain().builder()
    count = np.where((at <= STEPS) & (until > STEPS), 7.0, 0.0)
    for index in range(layer, 12):
        for name in (f"layers.{index}", f"layers.{index}.act"):
            builder.set("modules", "output_nonfinite", name, count)
    if reaches:
        builder.arrays["parameters"]["grad_nonfinite"][:] = count[:, None]
        builder.scalars["loss_nonfinite"][:] = count > 0
        builder.scalars["loss"][count > 0] = np.nan
    return builder


class TestNonFiniteActivation:
    def test_names_the_first_module_and_the_step(self) -> None:
        (finding,) = found(broken().build(), non_finite_activation)
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.5"
        assert "output of layers.5, and of 13 modules after it" in finding.message
        assert "at step 40," in finding.message
        evidence = finding.evidence[0]
        assert (evidence.first_step, evidence.last_step, evidence.observed) == (40, 99, 7)

    def test_a_container_hands_on_what_a_layer_inside_it_broke(self) -> None:
        builder = broken()
        values = builder.arrays["modules"]["output_nonfinite"][:, builder.at("modules", "layers.5")]
        add(builder, "modules", "block", group="container", depth=3, output_nonfinite=values)
        (finding,) = found(builder.build(), non_finite_activation)
        assert finding.layer == "layers.5"

    def test_gives_the_interval_where_steps_were_not_recorded(self) -> None:
        builder = broken()
        builder.steps = builder.steps * 10
        (finding,) = found(builder.build(), non_finite_activation)
        assert "at step 400 (it began after step 390, the record before)" in finding.message
        assert finding.evidence[0].first_step == 391

    def test_weights_that_may_have_been_nan_before_leave_it_to_the_gradient(self) -> None:
        builder = broken(layer=0)
        (finding,) = found(builder.build(), non_finite_activation)
        assert finding.layer == "layers.0"
        builder.steps = builder.steps * 10
        assert found(builder.build(), non_finite_activation) == []

    def test_an_input_that_is_broken_breaks_nothing(self) -> None:
        builder = broken()
        add(builder, "signals", "input", nonfinite=np.where(STEPS >= 40, 1.0, 0.0))
        assert found(builder.build(), non_finite_activation) == []

    @pytest.mark.parametrize(
        ("reaches", "until", "expected"),
        [
            (True, 100, Severity.ERROR),
            # A mask of -inf.
            (False, 100, Severity.INFO),
            # Skipped, and forgotten.
            (True, 42, Severity.INFO),
            (True, 55, Severity.ERROR),
        ],
    )
    def test_harm_is_what_reaches_the_loss_and_stays(
        self, reaches: bool, until: int, expected: Severity
    ) -> None:
        run = broken(reaches=reaches, until=until).build()
        (finding,) = found(run, non_finite_activation)
        assert finding.severity is expected

    def test_says_what_came_before(self) -> None:
        builder = broken()
        builder.set("modules", "output_absmax", "layers.5", np.geomspace(1, 1e9, 100))
        (finding,) = found(builder.build(), non_finite_activation)
        # 19 records apart, as 20 of them are looked at: 10**(9·19/99).
        assert "had grown 53.4-fold, to 3,511, within 20 records" in finding.message
        builder.set("modules", "output_absmax", "layers.5", 9_000.0)
        builder.set("modules", "output_grad_underflow_fraction", "layers.5", 0.0)
        (finding,) = found(builder.build(), non_finite_activation)
        assert "had reached 9,000, and float16 ends at 65,504" in finding.message
        assert "Compute layers.5 in float32" in finding.remedies[0]

    def test_a_healthy_run_has_none(self) -> None:
        assert found(Chain().run(), non_finite_activation) == []


def by_hand() -> dict[str, Any]:
    """The graph of a cross-entropy by hand, whose logarithm and root may break."""
    model = nn.Linear(3, 1)
    output = model(torch.rand(4, 3))
    return graph_of((output.square().sqrt() + output.log()).mean(), output, model)


def test_the_loss_tells_what_it_takes() -> None:
    builder = Chain(meta={"graph": by_hand()}).builder()
    add(builder, "modules", "(root)", group="container", output_nonfinite=0.0)
    builder.scalars["loss_nonfinite"][:] = 1
    (finding,) = found(builder.build(), non_finite_loss)
    assert "output was finite then, and the loss takes a square root and a logarithm" in (
        finding.message
    )
    builder.set("modules", "output_nonfinite", "(root)", 1.0)
    (finding,) = found(builder.build(), non_finite_loss)
    assert "output was finite" not in finding.message


def test_the_gradient_tells_what_the_loss_takes() -> None:
    builder = Chain(meta={"graph": by_hand()}).builder()
    builder.set("parameters", "grad_nonfinite", "layers.3.weight", 1.0)
    builder.set("modules", "output_grad_nonfinite", "layers.3", 1.0)
    (finding,) = found(builder.build(), non_finite_gradient)
    assert "output of layers.3 or behind it (the loss takes a square root and a logarithm)" in (
        finding.message
    )


def faint(share: object, fall: Fall = STUCK, zeros: object = 0.0) -> Builder:
    """A run whose gradients at layers.0 and layers.1 are this much subnormal."""
    builder = Chain(layers=4, loss=fall).builder()
    modules = builder.arrays["modules"]
    modules["output_grad_underflow_fraction"][:] = 0
    modules["output_grad_zero_fraction"][:] = 0
    for name in ("layers.0", "layers.1"):
        builder.set("modules", "output_grad_underflow_fraction", name, share)
        builder.set("modules", "output_grad_zero_fraction", name, zeros)
    return builder


def keeping(
    lost: float, fall: Fall, *, kind: str = "AdamW", rate: float = 1e-5, gradient: float = 0.1
) -> Builder:
    """A run whose steps leave this share of each weight as it was."""
    meta = {"coverage": {"optimizers": [{"type": kind, "lr": rate}]}}
    builder = Chain(layers=4, loss=fall, meta=meta).builder()
    parameters = builder.arrays["parameters"]
    parameters["update_lost_fraction"][:] = lost
    parameters["update_ratio"][:] = 0.0 if lost == 1 else 1e-9
    parameters["grad_rms"][:] = gradient
    builder.scalars["learning_rate"][:] = rate
    return builder


class TestHalfPrecisionUnderflow:
    @pytest.mark.parametrize(
        ("share", "fall", "zeros", "expected"),
        [
            (0.6, STUCK, 0.0, Severity.ERROR),
            (0.6, LEARNING, 0.0, Severity.INFO),
            (0.6, UNSEEN, 0.0, Severity.INFO),
            (0.95, UNSEEN, 0.0, Severity.WARNING),
            (0.95, LEARNING, 0.0, Severity.INFO),
            (0.4, STUCK, 0.0, None),
            # Of those that are not zero.
            (0.3, STUCK, 0.5, Severity.ERROR),
            (np.where(STEPS < 60, 0.1, 0.9), STUCK, 0.0, None),
        ],
    )
    def test_gradients(
        self, share: object, fall: Fall, zeros: object, expected: Severity | None
    ) -> None:
        findings = found(faint(share, fall, zeros).build(), half_precision_underflow)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_says_where_and_what_a_scale_would_do(self) -> None:
        builder = faint(0.6)
        (finding,) = found(builder.build(), half_precision_underflow)
        assert "60% of the gradient's entries other than zero at layers.0" in finding.message
        assert "GradScaler" in finding.remedies[0]
        builder.scalars["loss_scale"] = np.full(100, 4.0)
        (finding,) = found(builder.build(), half_precision_underflow)
        assert "at a loss scale of 4;" in finding.message
        assert "from 4:" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("lost", "fall", "expected"),
        [
            (1.0, STUCK, Severity.ERROR),
            (0.95, LEARNING, Severity.WARNING),
            (0.95, CONVERGED, Severity.INFO),
            (0.85, STUCK, None),
        ],
    )
    def test_updates(self, lost: float, fall: Fall, expected: Severity | None) -> None:
        findings = found(keeping(lost, fall).build(), half_precision_underflow)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    @pytest.mark.parametrize(
        ("kind", "rate", "gradient", "amount"),
        [
            ("SGD", 1e-2, 1e-2, 1),
            # A step that float32 would lose, too: the learning rate is zero, the gradient tiny.
            ("SGD", 1e-2, 1e-9, 0),
            ("AdamW", 0.0, 0.1, 0),
            # Nobody knows what this one meant to do.
            ("Muon", 1e-2, 0.1, 0),
        ],
    )
    def test_only_steps_that_single_precision_would_take(
        self, kind: str, rate: float, gradient: float, amount: int
    ) -> None:
        builder = keeping(1.0, STUCK, kind=kind, rate=rate, gradient=gradient)
        assert len(found(builder.build(), half_precision_underflow)) == amount

    def test_single_precision_is_silent(self) -> None:
        builder = keeping(0.0, STUCK)
        parameters = builder.arrays["parameters"]
        parameters["grad_underflow_fraction"][:] = 0.9
        parameters["grad_zero_fraction"][:] = 0.0
        # float32's own subnormals.
        parameters["grad_absmax"][:] = 1e-38
        assert found(builder.build(), half_precision_underflow) == []


def large(sizes: object, nonfinite: object = 0.0, *, half: bool = True) -> Builder:
    builder = Chain(layers=4).builder()
    builder.set("modules", "output_absmax", "layers.2", sizes)
    builder.set("modules", "output_nonfinite", "layers.2", nonfinite)
    if half:
        builder.arrays["modules"]["output_grad_underflow_fraction"][:] = 0
    return builder


class TestHalfPrecisionOverflow:
    OVER = np.where(STEPS >= 40, 3.0, 0.0)

    def test_infinite_beside_nearly_infinite(self) -> None:
        builder = large(60_000.0, self.OVER)
        builder.scalars["skipped"] = (STEPS >= 40).astype(float)
        (finding,) = found(builder.build(), half_precision_overflow)
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.2"
        assert "65,504, at step 40 (what stayed finite reached 60,000)" in finding.message
        assert "60% of all steps were skipped" in finding.message

    @pytest.mark.parametrize(
        ("sizes", "nonfinite", "half", "expected"),
        [
            (40_000.0, 0.0, True, Severity.INFO),
            (30_000.0, 0.0, True, None),
            # bfloat16 goes on.
            (np.geomspace(1e4, 1e6, 100), 0.0, True, None),
            # NaN beside small numbers is no overflow.
            (10.0, OVER, True, None),
            # A single step that a scaler skipped.
            (20_000.0, np.where(STEPS == 50, 1.0, 0.0), True, Severity.INFO),
            (60_000.0, OVER, False, None),
        ],
    )
    def test_what_is_and_what_is_not(
        self, sizes: object, nonfinite: object, half: bool, expected: Severity | None
    ) -> None:
        findings = found(large(sizes, nonfinite, half=half).build(), half_precision_overflow)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_what_another_module_broke_before_is_not_its_overflow(self) -> None:
        builder = large(60_000.0, self.OVER)
        builder.set("modules", "output_nonfinite", "layers.1", self.OVER)
        builder.set("modules", "output_absmax", "layers.1", 10.0)
        levels = [f.severity for f in found(builder.build(), half_precision_overflow)]
        assert levels == [Severity.INFO]


def scaled(skips: object, fall: Fall = LEARNING, start: float = 65536.0) -> Builder:
    """A GradScaler that halves its scale with each skipped step."""
    builder = Chain(layers=4, loss=fall).builder()
    flags = np.broadcast_to(np.asarray(skips, dtype=float), (100,)).copy()
    builder.scalars["skipped"] = flags
    halvings = np.concatenate([[0], np.cumsum(flags)[:-1]])
    builder.scalars["loss_scale"] = start / 2.0**halvings
    return builder


class TestLossScaleCollapse:
    @pytest.mark.parametrize(
        ("skips", "fall", "expected"),
        [
            # The search, then one step now and then.
            ((STEPS < 10) | (STEPS == 60), LEARNING, None),
            (STEPS < 15, LEARNING, None),
            # One in five.
            (STEPS % 5 == 4, LEARNING, Severity.WARNING),
            (STEPS % 5 == 4, STUCK, Severity.ERROR),
            # One in twelve is less than a tenth.
            ((STEPS % 12 == 11) & (STEPS > 10), LEARNING, None),
            (np.ones(100), STUCK, Severity.ERROR),
            (STEPS > 5, LEARNING, Severity.ERROR),
            # Down to a half of 1 within the search, and stable there: too small all the same.
            (STEPS < 17, LEARNING, Severity.WARNING),
        ],
    )
    def test_the_search_is_no_collapse(
        self, skips: object, fall: Fall, expected: Severity | None
    ) -> None:
        findings = found(scaled(skips, fall).build(), loss_scale_collapse)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_says_from_where_to_where(self) -> None:
        (finding,) = found(scaled(STEPS % 5 == 4).build(), loss_scale_collapse)
        # 19 skips before the last step, of which the middle of the last five shows 19.
        assert "from 65,536 to 0.125, and 20% of the steps" in finding.message
        assert finding.evidence[0].first_step == 4

    def test_a_small_scale_that_stays_was_chosen(self) -> None:
        assert found(scaled(0.0, start=0.5).build(), loss_scale_collapse) == []

    def test_without_a_scaler_it_is_not_judged(self) -> None:
        report = analyze(Chain().run(), rules=[loss_scale_collapse])
        assert [skip.reason for skip in report.skipped] == ["no GradScaler was seen"]


SICK: dict[str, tuple[Any, Any]] = {
    "GS502": (non_finite_activation, broken),
    "GS504": (half_precision_underflow, lambda: faint(0.6)),
    "GS505": (half_precision_overflow, lambda: large(60_000.0, TestHalfPrecisionOverflow.OVER)),
    "GS506": (loss_scale_collapse, lambda: scaled(STEPS % 5 == 4, STUCK)),
}


@pytest.mark.parametrize("code", SICK)
@given(seed=st.integers(0, 1_000), scale=st.floats(1e-3, 1e3))
def test_neither_the_order_of_columns_nor_the_scale_of_the_loss_matters(
    code: str, seed: int, scale: float
) -> None:
    rule, make = SICK[code]
    (before,) = found(make().build(), rule)
    builder = make().shuffled(seed)
    builder.scalars["loss"] *= scale
    (after,) = found(builder.build(), rule)
    assert (after.severity, after.layer, after.evidence[0]) == (
        before.severity,
        before.layer,
        before.evidence[0],
    )


@pytest.mark.parametrize("lack", ["NaN", "one step"])
@pytest.mark.parametrize("code", SICK)
def test_too_little_is_no_finding_and_no_failure(code: str, lack: str) -> None:
    rule, make = SICK[code]
    builder = make()
    if lack == "NaN":
        for values in builder.scalars.values():
            values[:] = np.nan
    report = analyze(poor(builder, lack), rules=[rule])
    assert report.findings == ()
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]


def test_a_run_without_modules_is_not_judged() -> None:
    run = Chain().run()
    empty = replace(run.modules, entities=(), values=run.modules.values[:, :, :0])
    bare = replace(run, modules=empty)
    for rule, _ in SICK.values():
        report = analyze(bare, rules=[rule])
        assert report.findings == ()
        assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
