"""Rules on runs in which optimizers take turns: each parameter is measured on its own only."""

from dataclasses import replace

import numpy as np
import pytest

from gradscope.analysis.finding import Severity
from tests.analysis.synthetic import Builder, Chain
from tests.analysis.test_depth_rules import findings


class TestOptimizersInTurn:
    """Layers 0 to 5 are stepped at every odd step, 6 to 11 at the others."""

    def in_turn(self, loss: tuple[float, float] = (2.3, 1.8), optimizers: int = 2) -> Builder:
        coverage = {"optimizers": [{"type": "Adam"}] * optimizers}
        builder = Chain(loss=loss, steps=200, meta={"coverage": coverage}).builder()
        for table, quantities in (
            ("parameters", ("grad_norm", "grad_nonfinite", "update_ratio", "update_norm")),
            ("modules", ("output_grad_norm", "output_grad_nonfinite", "dead_unit_fraction")),
        ):
            for quantity in quantities:
                values = builder.arrays[table][quantity]
                values[0::2, : values.shape[1] // 2] = np.nan
                values[1::2, values.shape[1] // 2 :] = np.nan
        return builder

    def silent(self, builder: Builder, since: int = 21, layers: int = 6) -> Builder:
        """The first optimizer's gradients are exactly zero from then on, of biases too."""
        for table, quantity in (
            ("parameters", "grad_norm"),
            ("parameters", "update_norm"),
            ("modules", "output_grad_norm"),
        ):
            values = builder.arrays[table][quantity]
            # Weight and bias of a layer, or its output and its activation's.
            own = values[since:, : 2 * layers]
            own[~np.isnan(own)] = 0
        return builder

    def test_healthy(self) -> None:
        assert findings(self.in_turn().build()) == {}

    @pytest.mark.parametrize("since", [21, 22])
    def test_says_since_when_though_others_step_in_between(self, since: int) -> None:
        builder = self.silent(self.in_turn(), since)
        finding = findings(builder.build())["GS003"]
        assert finding.severity is Severity.WARNING
        # The first step of theirs from there on.
        first = since + (since + 1) % 2
        assert f"since step {first}, while what another optimizer steps" in finding.message
        assert "6 weights" in finding.message
        assert {evidence.first_step for evidence in finding.evidence} == {first}

    @pytest.mark.parametrize("end", [0.001, 1.0, 2.3])
    def test_is_harm_whatever_the_loss_of_the_other_does(self, end: float) -> None:
        builder = self.silent(self.in_turn((2.3, end)))
        builder.scalars["loss"][100:] = end
        assert findings(builder.build())["GS003"].severity >= Severity.WARNING

    def test_is_harm_though_the_output_gets_a_gradient_of_zero(self) -> None:
        builder = self.silent(self.in_turn())
        last = builder.entities["modules"][-1]
        builder.entities["modules"][-1] = replace(last, name="(root)", group="container")
        builder.set("modules", "output_grad_norm", "(root)", 0.0)
        assert findings(builder.build())["GS003"].severity is Severity.WARNING

    def test_is_harm_though_the_graph_is_severed(self) -> None:
        builder = self.silent(self.in_turn())
        for quantity in ("output_grad_norm", "output_grad_nonfinite"):
            builder.arrays["modules"][quantity][21:, :12] = np.nan
        assert findings(builder.build())["GS003"].severity is Severity.WARNING

    def test_of_one_optimizer_a_layer_without_use_is_information(self) -> None:
        builder = self.silent(self.in_turn(optimizers=1))
        for quantity in ("output_grad_norm", "output_grad_nonfinite"):
            builder.arrays["modules"][quantity][21:, :12] = np.nan
        assert findings(builder.build())["GS003"].severity is Severity.INFO

    def test_where_some_still_get_one_it_is_as_with_one_optimizer(self) -> None:
        builder = self.silent(self.in_turn(), layers=2)
        assert "since step 21." in findings(builder.build())["GS003"].message
        builder.scalars["loss"][100:] = 0.001
        assert "GS003" not in findings(builder.build())

    def test_a_dead_layer_is_seen_though_its_optimizer_did_not_step_last(self) -> None:
        for end in (199, 200):
            builder = self.silent(self.in_turn())
            builder.arrays["modules"]["dead_unit_fraction"][1::2, 11] = 1.0
            builder.steps = builder.steps[:end]
            for quantities in builder.arrays.values():
                for quantity, values in quantities.items():
                    quantities[quantity] = values[:end]
            for name, scalar in builder.scalars.items():
                builder.scalars[name] = scalar[:end]
            found = findings(builder.build())
            assert found["GS003"].message.endswith("every unit of layers.5.act is zero.")
            assert "no weight before it gets a gradient" in found["GS301"].message

    def test_a_forgotten_layer_is_reached_on_the_turns_of_its_network(self) -> None:
        builder = self.in_turn()
        for leaf in ("weight", "bias"):
            name = f"layers.2.{leaf}"
            for quantity in ("grad_norm", "grad_nonfinite", "update_ratio", "update_norm"):
                builder.set("parameters", quantity, name, np.nan)
            builder.set("parameters", "in_optimizer", name, 0)
            builder.set("parameters", "weight_norm", name, 8.0)
            builder.set("parameters", "grad_missing", name, np.arange(200) % 2 == 0)
        finding = findings(builder.build())["GS004"]
        assert "layers.2.weight" in finding.message

    @pytest.mark.parametrize("turns", [2, 6])
    def test_a_gradient_that_fades_is_judged_where_it_went_all_the_way(self, turns: int) -> None:
        fading = Chain(factor=0.15, activation="Sigmoid", updates_follow=False)
        codes = set(findings(fading.run()))
        builder = fading.builder()
        for quantity in ("output_grad_norm", "output_grad_nonfinite"):
            # In the other turns the later layers train alone.
            builder.arrays["modules"][quantity][np.arange(100) % turns != 0, :12] = np.nan
        assert set(findings(builder.build())) == codes == {"GS101"}

    def test_zero_for_four_of_its_own_steps_is_no_finding(self) -> None:
        # A fifth of its hundred steps is needed.
        assert findings(self.silent(self.in_turn(), since=162).build()) == {}
        assert "GS003" in findings(self.silent(self.in_turn(), since=160).build())

    def test_a_loss_of_zero_is_no_harm(self) -> None:
        builder = self.silent(self.in_turn())
        builder.scalars["loss"][30:] = 0.0
        assert "GS003" not in findings(builder.build())
