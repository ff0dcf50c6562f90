"""GS001 to GS004 and GS503 on runs with a known diagnosis."""

from dataclasses import replace

import numpy as np
import pytest

from gradscope.analysis.finding import Severity
from gradscope.record import Run
from tests.analysis.synthetic import Builder, Chain, asked
from tests.analysis.test_depth_rules import STUCK, findings


def without_gradient(builder: Builder, *layers: int) -> Builder:
    """The layers' weights and biases have .grad = None at every step."""
    for layer in layers:
        for leaf in ("weight", "bias"):
            name = f"layers.{layer}.{leaf}"
            builder.set("parameters", "grad_missing", name, 1)
            builder.set("parameters", "grad_norm", name, np.nan)
            builder.set("parameters", "grad_nonfinite", name, np.nan)
            builder.set("parameters", "update_ratio", name, np.nan)
        for module in (f"layers.{layer}", f"layers.{layer}.act"):
            builder.set("modules", "output_grad_norm", module, np.nan)
            builder.set("modules", "output_grad_nonfinite", module, np.nan)
    return builder


class TestNothingRecorded:
    @pytest.mark.parametrize(
        ("coverage", "words"),
        [
            ({"forwards": 0, "optimizer_steps": 0}, "forward never ran"),
            ({"forwards": 7, "optimizer_steps": 0}, "ran 7 times, but no optimizer stepped"),
            ({"forwards": 1, "optimizer_steps": 0}, "ran once, but no optimizer stepped"),
            ({"forwards": 0, "optimizer_steps": 3}, "3 optimizer steps were seen"),
            ({"forwards": 0, "optimizer_steps": 1}, "1 optimizer step was seen"),
        ],
    )
    def test_says_why(self, coverage: dict[str, int], words: str) -> None:
        finding = findings(Chain(steps=0, meta={"coverage": coverage}).run())["GS001"]
        assert finding.severity is Severity.WARNING
        assert words in finding.message
        assert finding.remedies

    def test_all_none_is_nothing(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 0, 1, 2, 3)
        assert "every parameter's .grad was None" in findings(builder.build())["GS001"].message

    def test_advises_what_was_not_done_already(self) -> None:
        known = {"forwards": 1, "optimizer_steps": 0}
        ended = {"part": "training", "message": "training ended with RuntimeError"}
        for more, problems, reason, remedy in (
            ({}, [], "parameters.", "Give watch() the optimizer"),
            ({"optimizers_given": 1}, [], "parameters.", "Call step() of the optimizer"),
            ({"optimizers_given": 1}, [ended], "parameters: training ended with", "Mend what"),
        ):
            meta = {"coverage": {**known, **more}, "problems": problems}
            finding = findings(Chain(steps=0, meta=meta).run())["GS001"]
            assert reason in finding.message
            assert finding.remedies[0].startswith(remedy)

    def test_other_processes_than_the_one_that_writes_have_no_finding(self) -> None:
        for rank, found in ((0, ["GS001"]), (1, [])):
            run = Chain(steps=0, meta={"distributed": {"rank": rank, "world_size": 2}}).run()
            report = asked(run)
            assert [finding.code for finding in report.findings] == found
        (skip,) = (skip for skip in report.skipped if skip.code == "GS001")
        assert skip.reason == "rank 0 of 2 processes has the report"

    def test_one_gradient_is_something(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 0, 1, 2)
        assert "GS001" not in findings(builder.build())


class TestMissingGradient:
    def test_a_severed_majority_is_a_warning_though_the_loss_falls(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 0, 1, 2)
        finding = findings(builder.build())["GS002"]
        assert finding.severity is Severity.WARNING
        assert finding.layer == "layers.0"
        assert "6 of 8 parameters" in finding.message
        assert "75%" in finding.message
        assert "severed" in finding.message

    def test_an_unused_head_is_information(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 3)
        finding = findings(builder.build())["GS002"]
        assert finding.severity is Severity.INFO
        assert "severed" not in finding.message

    def test_an_unused_head_that_runs_before_the_used_one_is_information(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 2)
        assert findings(builder.build())["GS002"].severity is Severity.INFO

    def test_a_stuck_loss_is_harm(self) -> None:
        builder = without_gradient(Chain(layers=4, loss=STUCK).builder(), 0, 1, 2)
        assert findings(builder.build())["GS002"].severity is Severity.ERROR

    def test_missing_now_and_then_is_no_finding(self) -> None:
        builder = Chain(layers=4).builder()
        builder.set("parameters", "grad_missing", "layers.0.weight", np.arange(100) % 2)
        assert "GS002" not in findings(builder.build())

    def test_frozen_is_no_finding(self) -> None:
        builder = without_gradient(Chain(layers=4).builder(), 0)
        for leaf in ("weight", "bias"):
            builder.set("parameters", "requires_grad", f"layers.0.{leaf}", 0)
        assert findings(builder.build()) == {}


class TestNotInOptimizer:
    def forgotten(self, **chain: tuple[float, float]) -> Builder:
        builder = Chain(layers=4, **chain).builder()  # type: ignore[arg-type]
        for layer in (0, 1):
            for leaf in ("weight", "bias"):
                name = f"layers.{layer}.{leaf}"
                builder.set("parameters", "in_optimizer", name, 0)
                builder.set("parameters", "grad_norm", name, np.nan)
                builder.set("parameters", "update_ratio", name, np.nan)
                builder.set("parameters", "weight_norm", name, 8.0)
        return builder

    def test_forgotten_layers(self) -> None:
        found = findings(self.forgotten().build())
        assert list(found) == ["GS004"]
        assert found["GS004"].severity is Severity.WARNING
        assert "4 of 8 trainable parameters" in found["GS004"].message
        assert "50%" in found["GS004"].message

    def test_with_a_stuck_loss_it_is_an_error(self) -> None:
        finding = findings(self.forgotten(loss=STUCK).build())["GS004"]
        assert finding.severity is Severity.ERROR

    def test_weights_that_something_else_moves_are_no_finding(self) -> None:
        builder = self.forgotten()
        for layer in (0, 1):
            for leaf in ("weight", "bias"):
                builder.set(
                    "parameters", "weight_norm", f"layers.{layer}.{leaf}", 8 + np.arange(100)
                )
        assert findings(builder.build()) == {}

    def test_frozen_is_no_finding(self) -> None:
        builder = self.forgotten()
        builder.arrays["parameters"]["requires_grad"][:, :4] = 0
        assert findings(builder.build()) == {}


class TestZeroGradient:
    def zero(self, builder: Builder, layer: int, since: int = 0) -> Builder:
        values = np.full(len(builder.steps), 0.1)
        values[since:] = 0
        builder.set("parameters", "grad_norm", f"layers.{layer}.weight", values)
        return builder

    def test_a_layer_that_stays_zero(self) -> None:
        finding = findings(self.zero(Chain().builder(), 1, since=40).build())["GS003"]
        assert finding.severity is Severity.WARNING
        assert finding.layer == "layers.1"
        assert "since step 40" in finding.message

    def test_dead_units_are_named(self) -> None:
        builder = self.zero(Chain().builder(), 1)
        builder.set("modules", "dead_unit_fraction", "layers.1.act", 1.0)
        finding = findings(builder.build())["GS003"]
        assert "every unit of layers.1.act is zero" in finding.message
        assert "Revive" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("layers", "fall", "severity"),
        [
            (3, (2.3, 1.8), Severity.WARNING),  # the rest learns
            (3, STUCK, Severity.ERROR),
            (4, (2.3, 1.8), Severity.ERROR),  # nothing is left that could
            (4, (2.3, 0.4), Severity.ERROR),
            (3, (2.3, 0.02), Severity.WARNING),
        ],
    )
    def test_most_of_the_weights(
        self, layers: int, fall: tuple[float, float], severity: Severity
    ) -> None:
        builder = Chain(layers=4, loss=fall).builder()
        for layer in range(layers):
            self.zero(builder, layer)
        assert findings(builder.build())["GS003"].severity is severity

    def test_zero_in_the_first_steps_only_is_structure(self) -> None:
        # LoRA's A, zero-initialized residual branches.
        builder = Chain().builder()
        values = np.full(100, 0.1)
        values[:2] = 0
        builder.set("parameters", "grad_norm", "layers.0.weight", values)
        assert findings(builder.build()) == {}

    @pytest.mark.parametrize(("steps", "needed"), [(100, 20), (10, 5)])
    def test_lasting_is_five_steps_and_a_fifth_of_all(self, steps: int, needed: int) -> None:
        for length in (needed - 1, needed):
            builder = self.zero(Chain(steps=steps).builder(), 0, since=steps - length)
            assert ("GS003" in findings(builder.build())) is (length == needed)

    def test_a_head_that_is_no_longer_used_is_information(self) -> None:
        builder = self.zero(Chain().builder(), 11, since=50)
        for quantity in ("output_grad_norm", "output_grad_nonfinite"):
            builder.arrays["modules"][quantity][50:, builder.at("modules", "layers.11")] = np.nan
        assert findings(builder.build())["GS003"].severity is Severity.INFO

    def test_biases_are_not_judged(self) -> None:
        builder = Chain().builder().set("parameters", "grad_norm", "layers.0.bias", 0)
        assert findings(builder.build()) == {}

    def test_a_layer_that_the_loss_does_not_use_is_information(self) -> None:
        builder = self.zero(Chain().builder(), 11)
        builder.set("modules", "output_grad_nonfinite", "layers.11", np.nan)
        builder.set("modules", "output_grad_norm", "layers.11", np.nan)
        finding = findings(builder.build())["GS003"]
        assert finding.severity is Severity.INFO
        assert "does not use" in finding.message

    def test_a_solved_loss_sends_nothing_and_a_dead_net_is_sent_something(self) -> None:
        for sent in (0.0, 0.1):
            builder = Chain(layers=4, loss=(1.26, 0.5)).builder()
            for layer in range(4):
                self.zero(builder, layer)
            last = builder.entities["modules"][-1]
            builder.entities["modules"][-1] = replace(last, name="(root)", group="container")
            builder.set("modules", "output_grad_norm", "(root)", sent)
            assert ("GS003" in findings(builder.build())) is (sent > 0)


class TestNonFiniteGradient:
    def broken(self, since: int = 30, until: int = 100) -> Builder:
        builder = Chain().builder()
        values = np.zeros(100)
        values[since:until] = 5
        builder.set("parameters", "grad_nonfinite", "layers.3.weight", values)
        return builder

    def test_names_step_and_parameter(self) -> None:
        finding = findings(self.broken().build())["GS503"]
        assert finding.severity is Severity.ERROR
        assert finding.layer == "layers.3.weight"
        assert "1 of 24 gradients" in finding.message
        assert "at step 30" in finding.message
        assert finding.evidence[0].observed == 5

    def test_the_interval_where_the_step_before_was_not_recorded(self) -> None:
        builder = self.broken()
        builder.steps = builder.steps * 10
        assert "at step 300 (it began after step 290" in findings(builder.build())["GS503"].message

    def test_names_the_first_broken_output(self) -> None:
        builder = self.broken()
        for layer in range(5, 12):
            for name in (f"layers.{layer}", f"layers.{layer}.act"):
                values = np.zeros(100)
                values[30:] = 1
                builder.set("modules", "output_nonfinite", name, values)
        message = findings(builder.build())["GS503"].message
        assert "broken first at the output of layers.5" in message

    def test_names_where_the_way_back_broke(self) -> None:
        builder = self.broken()
        for layer in range(5):
            values = np.zeros(100)
            values[30:] = 1
            builder.set("modules", "output_grad_nonfinite", f"layers.{layer}", values)
        message = findings(builder.build())["GS503"].message
        assert "the forward pass was finite" in message
        assert "output of layers.4 " in message

    def test_a_healthy_run_has_none(self) -> None:
        assert "GS503" not in findings(Chain().run())


def test_a_table_full_of_nan_is_skipped_with_its_reason() -> None:
    builder = Chain().builder()
    for quantities in builder.arrays.values():
        for values in quantities.values():
            values[:] = np.nan
    report = asked(builder.build())
    assert [finding.code for finding in report.findings] == ["GS001"]
    reasons = {skip.code: skip.reason for skip in report.skipped}
    assert reasons["GS101"] == "not measured: modules.output_grad_norm"


def test_one_step_is_enough_for_a_report() -> None:
    run: Run = Chain(steps=1).run()
    assert findings(run) == {}


class TestNonFiniteLoss:
    def broken(self, steps: slice) -> Builder:
        builder = Chain().builder()
        builder.scalars["loss"][steps] = np.nan
        builder.scalars["loss_nonfinite"][steps] = 1
        return builder

    def test_from_the_first_step(self) -> None:
        finding = findings(self.broken(slice(None)).build())["GS501"]
        assert finding.severity is Severity.ERROR
        assert "from the first step on, at 100 of 100 steps" in finding.message

    def test_one_that_stays(self) -> None:
        assert "first at step 95" in findings(self.broken(slice(95, None)).build())["GS501"].message

    def test_one_that_recovers_is_no_finding(self) -> None:
        assert findings(self.broken(slice(40, 45)).build()) == {}


class TestUnfinishedBusiness:
    def test_a_stuck_loss_during_warm_up_proves_nothing(self) -> None:
        builder = Chain(loss=STUCK, factor=0.15, activation="Sigmoid").builder()
        builder.set("parameters", "update_ratio", "layers.0.weight", 1e-9)
        assert findings(builder.build())["GS101"].severity is Severity.ERROR
        builder.scalars["learning_rate"] = np.linspace(0, 1e-3, 100)
        assert findings(builder.build())["GS101"].severity is not Severity.ERROR

    def test_a_large_constant_in_the_loss_does_not_hide_progress(self) -> None:
        chain = Chain(loss=(5002.3, 5001.0), factor=0.15, activation="Sigmoid")
        assert findings(chain.run())["GS101"].severity is not Severity.ERROR

    def test_a_blow_up_that_comes_back_to_where_it_began_is_stuck(self) -> None:
        builder = Chain(factor=0.15, activation="Sigmoid", loss=(2.31, 2.31)).builder()
        builder.scalars["loss"][1:6] = 5e5
        assert findings(builder.build())["GS101"].severity is Severity.ERROR
