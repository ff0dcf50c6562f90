"""GS401 and GS402 on runs with a known diagnosis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.analysis.finding import Severity
from gradscope.analysis.harm import LossVerdict, progress
from gradscope.record import Run
from tests.analysis.synthetic import Builder, Chain, asked
from tests.analysis.test_depth_rules import STUCK, findings
from tests.analysis.test_unit_rules import CONVERGED, LEARNING, cut_off, dying, saturating


def moving(builder: Builder, size: float, *steps: int, name: str = "layers.1.weight") -> Builder:
    """At these steps (none: at all) the update is so many times the weight."""
    rows = list(steps) or slice(None)
    column, table = builder.at("parameters", name), builder.arrays["parameters"]
    table["update_norm"][rows, column] = size * table["weight_norm"][rows, column]
    table["update_ratio"][rows, column] = size
    return builder


class TestUpdateTooLarge:
    def test_a_first_step_that_replaces_the_weights(self) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), 13.0, 0)
        builder.scalars["learning_rate"][:] = 1.0
        finding = findings(builder.build())["GS401"]
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.1"
        assert "Step 0 changed the weight of layers.1 by 13 times its size" in finding.message
        # 13 over 0.01, up to the next power of ten.
        assert "by about 10,000: 1 → 1e-4" in finding.remedies[0]
        evidence = finding.evidence[0]
        assert (evidence.quantity, evidence.entity) == ("update_ratio", "layers.1.weight")
        assert (evidence.first_step, evidence.last_step) == (0, 0)
        assert evidence.observed == pytest.approx(13.0)
        assert evidence.limit == 0.1

    def test_quotes_the_loss_of_the_step_that_it_names(self) -> None:
        # L-BFGS: the first step does most of it, and what comes after is the typical loss.
        builder = moving(Chain(layers=4, loss=(0.0076, 0.001), loss_noise=0).builder(), 5.0, 0)
        builder.scalars["loss"][0] = 0.563
        message = findings(builder.build())["GS401"].message
        end = np.median(np.linspace(0.0076, 0.001, 100)[-20:])
        assert f"the loss was 0.563 then, and {end:.3g} at last" in message
        builder.scalars["loss"][0] = np.nan
        assert "then, and" not in findings(builder.build())["GS401"].message

    @pytest.mark.parametrize(("size", "expected"), [(0.49, False), (0.51, True)])
    def test_half_of_a_weight_in_one_step(self, size: float, expected: bool) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), size, 3)
        assert ("GS401" in findings(builder.build())) is expected

    @pytest.mark.parametrize(("steps", "expected"), [(9, False), (11, True)])
    def test_a_tenth_of_it_in_a_tenth_of_the_steps(self, steps: int, expected: bool) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), 0.12, *range(steps))
        assert ("GS401" in findings(builder.build())) is expected

    def test_it_begins_where_the_updates_grew(self) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), 0.2, 0, 3, 4)
        moving(builder, 0.8, 5, 9)
        evidence = findings(builder.build())["GS401"].evidence[0]
        assert (evidence.first_step, evidence.last_step) == (3, 9)

    @pytest.mark.parametrize(
        ("level", "verdict"), [(2.3, LossVerdict.UNKNOWN), (60.0, LossVerdict.STUCK)]
    )
    def test_a_loss_far_above_its_start_is_stuck_however_noisy(
        self, level: float, verdict: LossVerdict
    ) -> None:
        builder = Chain(layers=4, loss=(level, level)).builder()
        builder.scalars["loss"] += np.random.default_rng(0).normal(0, level / 2, 100)
        builder.scalars["loss"][:10] = 2.3
        assert progress(builder.build()).verdict is verdict

    def test_the_dense_first_steps_do_not_count_more(self) -> None:
        # Ten of twenty-nine records, ten of two hundred steps.
        builder = moving(Chain(layers=4, steps=29, loss=STUCK).builder(), 0.2, *range(10))
        assert "GS401" in findings(builder.build())
        builder.steps = np.concatenate([np.arange(10), np.arange(10, 200, 10)])
        assert "GS401" not in findings(builder.build())

    @pytest.mark.parametrize("fall", [LEARNING, CONVERGED])
    def test_without_harm_it_is_information(self, fall: tuple[float, float]) -> None:
        builder = moving(Chain(layers=4, loss=fall).builder(), 2.0, 0, 1)
        assert findings(builder.build())["GS401"].severity is Severity.INFO

    @pytest.mark.parametrize(("height", "severity"), [(4.0, "info"), (40.0, "warning")])
    def test_a_loss_that_was_thrown_back_is_harm(self, height: float, severity: str) -> None:
        builder = moving(Chain(layers=4).builder(), 2.0, 30)
        builder.scalars["loss"][31:45] = height
        assert findings(builder.build())["GS401"].severity.value == severity

    def test_a_step_after_which_the_loss_stayed_lower_did_no_harm(self) -> None:
        # A hinge: met by the first steps, and at rest from then on.
        for size, severity in ((0.8, Severity.INFO), (1.2, Severity.ERROR)):
            builder = moving(Chain(layers=4, loss=(0.5, 0.5)).builder(), size, 0)
            builder.scalars["loss"][:3] = (1.2, 0.8, 0.6)
            assert findings(builder.build())["GS401"].severity is severity

    def test_without_a_loss_only_an_extreme_is_a_warning(self) -> None:
        for size, severity in ((5.0, Severity.INFO), (12.0, Severity.WARNING)):
            builder = moving(Chain(layers=4).builder(), size, 0)
            builder.scalars["loss"][:] = np.nan
            assert findings(builder.build())["GS401"].severity is severity

    def test_a_loss_that_is_not_progress_proves_nothing(self) -> None:
        meta = {"loss_is_progress": False}
        builder = moving(Chain(layers=4, loss=STUCK, meta=meta).builder(), 20.0, 0)
        assert findings(builder.build())["GS401"].severity is Severity.INFO

    @pytest.mark.parametrize("group", ["bias", "norm", "embedding"])
    def test_only_weights_are_judged(self, group: str) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), 13.0, 0)
        at = builder.at("parameters", "layers.1.weight")
        entities = builder.entities["parameters"]
        entities[at] = replace(entities[at], group=group)
        assert findings(builder.build()) == {}

    def test_what_starts_near_zero_is_measured_by_where_it_would_start(self) -> None:
        # 64 rows of PyTorch's default initialization have a norm of √(64/3) = 4.6.
        for change, expected in ((2.0, False), (3.0, True)):
            builder = Chain(layers=4, loss=STUCK).builder()
            builder.set("parameters", "weight_norm", "layers.1.weight", 1e-3)
            builder.set("parameters", "update_norm", "layers.1.weight", 1e-5)
            column = builder.at("parameters", "layers.1.weight")
            builder.arrays["parameters"]["update_norm"][0, column] = change
            assert ("GS401" in findings(builder.build())) is expected

    def test_what_float32_can_t_hold_is_too_large(self) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), np.inf, 0, 1)
        finding = findings(builder.build())["GS401"]
        assert "by infinite times" in finding.message
        assert "by about 10,000" in finding.remedies[0]

    def test_what_comes_to_a_loss_that_was_stuck_before_did_not_make_it_stick(self) -> None:
        for at, severity in ((5, Severity.ERROR), (60, Severity.INFO)):
            builder = moving(Chain(layers=4, loss=STUCK).builder(), 0.8, at)
            assert findings(builder.build())["GS401"].severity is severity

    @pytest.mark.parametrize(("at", "roots"), [(33, ["GS401"]), (10, ["GS501"])])
    def test_a_nan_right_after_it_is_its_work(self, at: int, roots: list[str]) -> None:
        builder = moving(Chain(layers=4).builder(), 5.0, at)
        builder.scalars["loss"][35:] = np.nan
        builder.scalars["loss_nonfinite"][35:] = 1
        report = asked(builder.build())
        assert [f.code for f in report.roots if f.severity is Severity.ERROR] == roots

    @pytest.mark.parametrize(("died", "causes"), [(0, ()), (1, ("GS401",))])
    def test_it_explains_units_that_die_in_the_next_step(
        self, died: int, causes: tuple[str, ...]
    ) -> None:
        builder = dying(Chain(layers=4, loss=STUCK).builder(), 2, 1.0, at=died)
        report = asked(moving(cut_off(builder, 2, at=died), 5.0, 0).build())
        explained = {f.code: f.explained_by for f in report.findings}
        assert explained["GS301"] == causes
        assert explained["GS003"] == (*causes, "GS301")

    def test_it_explains_what_saturates_afterwards(self) -> None:
        chain = Chain(layers=4, activation="Tanh", loss=STUCK)
        report = asked(moving(saturating(chain.builder(), 1, since=1), 5.0, 0).build())
        assert [(f.code, f.explained_by) for f in report.findings] == [
            ("GS401", ()),
            ("GS302", ("GS401",)),
        ]

    def test_an_exploding_gradient_explains_it(self) -> None:
        chain = Chain(factor=5.0, scale=5 * 2**0.5, loss=(1e9, 1e9))
        report = asked(moving(chain.builder(), 50.0, 0).build())
        assert [f.code for f in report.findings] == ["GS104", "GS102", "GS401"]
        assert report.findings[2].explained_by == ("GS104", "GS102")

    @given(loss=st.floats(-6, 6), weights=st.floats(0, 6), seed=st.integers(0, 100))
    def test_neither_scale_nor_order_matters(self, loss: float, weights: float, seed: int) -> None:
        builder = moving(Chain(layers=4, loss=STUCK).builder(), 2.0, 0, 1, 2)
        whole = findings(builder.build())["GS401"]
        builder.scalars["loss"] *= 10**loss
        builder.arrays["parameters"]["grad_norm"] *= 10 ** (loss - weights)
        for quantity in ("weight_norm", "weight_rms", "update_norm"):
            builder.arrays["parameters"][quantity] *= 10**weights
        found = findings(builder.shuffled(seed).build())["GS401"]
        assert (found.severity, found.layer, found.remedies) == (
            whole.severity,
            whole.layer,
            whole.remedies,
        )


def tiny(builder: Builder, share: float = 1e-6) -> Builder:
    """Every update is this share of its weight."""
    for name in [entity.name for entity in builder.entities["parameters"]]:
        moving(builder, share, name=name)
    return builder


class TestUpdateTooSmall:
    def run(self, fall: tuple[float, float] = STUCK, rate: float = 1e-5) -> Run:
        builder = tiny(Chain(layers=4, loss=fall).builder())
        builder.scalars["learning_rate"][:] = rate
        return builder.build()

    def test_a_rate_of_1e_5(self) -> None:
        finding = findings(self.run())["GS402"]
        assert finding.severity is Severity.ERROR
        assert "In 100 steps at a learning rate of 1e-5" in finding.message
        assert "less than 0.1% of itself" in finding.message
        assert "stuck" in finding.message
        # 1e-3 over 1e-6.
        assert "1,000-fold: 1e-5 → 0.01" in finding.remedies[0]
        evidence = finding.evidence[0]
        assert evidence.quantity == "update_ratio"
        assert (evidence.first_step, evidence.last_step) == (0, 99)
        assert evidence.observed == pytest.approx(1e-6, rel=1e-3)

    @pytest.mark.parametrize("fall", [LEARNING, CONVERGED])
    def test_a_loss_that_falls_however_slowly_or_has_fallen(
        self, fall: tuple[float, float]
    ) -> None:
        assert findings(self.run(fall)) == {}

    def test_one_weight_that_moves_a_hundredth_is_enough(self) -> None:
        for share, expected in ((0.9e-4, True), (1.1e-4, False)):
            builder = moving(tiny(Chain(layers=4, loss=STUCK).builder()), share)
            assert ("GS402" in findings(builder.build())) is expected

    def test_updates_that_could_have_lowered_the_loss_are_not_too_small(self) -> None:
        # Per step: 8 parameters × gradient × update, 8 · g · 1e-6 · 11.3; over 100 steps 1 % of
        # 2.31 needs g = 2.55.
        for gradient, expected in ((2.2, True), (2.8, False)):
            builder = tiny(Chain(layers=4, loss=STUCK).builder())
            builder.arrays["parameters"]["grad_norm"][:] = gradient
            assert ("GS402" in findings(builder.build())) is expected

    def test_while_the_rate_rises_nothing_is_said(self) -> None:
        builder = tiny(Chain(layers=4, loss=STUCK).builder())
        builder.scalars["learning_rate"] = np.linspace(1e-8, 1e-5, 100)
        assert findings(builder.build()) == {}

    def test_a_training_that_has_just_begun_is_not_judged(self) -> None:
        report = asked(tiny(Chain(layers=4, steps=99, loss=STUCK).builder()).build())
        reasons = {skip.code: skip.reason for skip in report.skipped}
        assert report.findings == ()
        assert reasons["GS402"] == "99 steps, 100 are needed"

    def test_a_loss_that_is_not_progress_proves_nothing(self) -> None:
        chain = Chain(layers=4, loss=STUCK, meta={"loss_is_progress": False})
        assert findings(tiny(chain.builder()).build()) == {}

    def test_weights_without_a_gradient_are_not_its_business(self) -> None:
        builder = cut_off(tiny(Chain(layers=4, loss=STUCK).builder()), 3)
        assert set(findings(builder.build())) == {"GS003"}

    def test_a_rate_of_zero(self) -> None:
        builder = tiny(Chain(layers=4, loss=STUCK).builder(), 0.0)
        builder.arrays["parameters"]["update_gradient_cosine"][:] = np.nan
        builder.scalars["learning_rate"][:] = 0.0
        finding = findings(builder.build())["GS402"]
        assert "learning rate of 0" in finding.message
        assert "where searches begin" in finding.remedies[0]

    def test_a_rate_that_a_schedule_let_fall(self) -> None:
        builder = tiny(Chain(layers=4, loss=STUCK).builder())
        builder.scalars["learning_rate"] = 0.1 * 0.5 ** np.arange(100.0)
        finding = findings(builder.build())["GS402"]
        assert "fell from 0.1 to 1.58e-31" in finding.message
        assert "scheduler.step()" in finding.remedies[0]

    def test_a_gradient_that_has_vanished_explains_it(self) -> None:
        builder = tiny(Chain(factor=0.15, activation="Sigmoid", loss=STUCK).builder())
        report = asked(builder.build())
        assert [(f.code, f.explained_by) for f in report.findings] == [
            ("GS101", ()),
            ("GS402", ("GS101",)),
        ]

    @given(loss=st.floats(-6, 6), seed=st.integers(0, 100))
    def test_neither_the_scale_of_the_loss_nor_the_order_matters(
        self, loss: float, seed: int
    ) -> None:
        builder = tiny(Chain(layers=4, loss=STUCK).builder())
        whole = findings(builder.build())["GS402"]
        builder.scalars["loss"] *= 10**loss
        builder.arrays["parameters"]["grad_norm"] *= 10**loss
        found = findings(builder.shuffled(seed).build())["GS402"]
        assert (found.severity, found.remedies) == (whole.severity, whole.remedies)
