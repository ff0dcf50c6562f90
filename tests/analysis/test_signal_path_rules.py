"""GS103, GS105, GS106 and GS107 on runs with a known diagnosis."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.analysis.finding import Severity
from gradscope.analysis.rule import SECTIONS, Rule
from gradscope.analysis.rules.exploding_through_time import exploding_through_time
from gradscope.analysis.rules.gradient_bottleneck import gradient_bottleneck
from gradscope.analysis.rules.symmetric_weights import symmetric_weights
from gradscope.analysis.rules.vanishing_through_time import vanishing_through_time
from gradscope.record import Entity
from tests.analysis.courses import finding_of, found
from tests.analysis.synthetic import Builder, Chain

STUCK = (2.31, 2.305)
RULES: tuple[Rule[Any], ...] = (
    gradient_bottleneck,
    symmetric_weights,
    vanishing_through_time,
    exploding_through_time,
)


def falling(builder: Builder, to: float) -> Builder:
    """With a loss that falls fast at first, to this share of its start."""
    builder.scalars["loss"] = 2.3 * (to + (1 - to) * np.exp(-np.arange(len(builder.steps)) / 10))
    return builder


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
class TestAnyRun:
    def test_has_a_page(self, rule: Rule[Any]) -> None:
        assert all(rule.section(section) for section in SECTIONS)

    @pytest.mark.parametrize("steps", [1, 2, 100])
    def test_is_silent_on_a_healthy_chain(self, rule: Rule[Any], steps: int) -> None:
        builder = Chain(steps=steps).builder()
        if steps == 1:
            builder.scalars["loss"][:] = 2.3
        assert finding_of(rule, builder.build()) is None

    def test_copes_with_nothing_measured(self, rule: Rule[Any]) -> None:
        builder = Chain(loss=STUCK).builder()
        for arrays in builder.arrays.values():
            for values in arrays.values():
                values[:] = np.nan
        assert finding_of(rule, builder.build()) is None

    def test_copes_with_no_entity(self, rule: Rule[Any]) -> None:
        builder = Builder(np.arange(30), [], [], {})
        assert finding_of(rule, builder.build()) is None


class TestBottleneck:
    def narrowed(self, factor: float, layer: int = 5, **chain: Any) -> Builder:
        """All layers before this one get so much less."""
        builder = Chain(**{"loss": STUCK, **chain}).builder()
        for quantity in ("output_grad_norm", "output_grad_rms"):
            builder.arrays["modules"][quantity][:, : 2 * layer] /= factor
        return builder

    def test_one_layer_that_loses_it(self) -> None:
        finding = found(gradient_bottleneck, self.narrowed(300).build())
        assert (finding.severity, finding.layer) == (Severity.ERROR, "layers.5")
        assert finding.evidence[0].observed == pytest.approx(300, rel=1e-5)
        assert (finding.evidence[0].first_step, finding.evidence[0].last_step) == (0, 99)
        assert "to the 5 before it" in finding.message
        assert "between layers.4 and layers.5" in finding.remedies[0]

    @pytest.mark.parametrize(("factor", "expected"), [(95, False), (105, True)])
    def test_the_limit_is_where_it_is_said_to_be(self, factor: float, expected: bool) -> None:
        run = self.narrowed(factor).build()
        assert (finding_of(gradient_bottleneck, run) is not None) is expected

    def test_without_harm_it_is_information(self) -> None:
        builder = falling(self.narrowed(1e4), to=0.4)
        assert found(gradient_bottleneck, builder.build()).severity is Severity.INFO

    def test_layers_before_it_that_stand_still_are_harm(self) -> None:
        builder = falling(self.narrowed(1e4), to=0.4)
        ratios = builder.arrays["parameters"]["update_ratio"]
        ratios[:, :10] = 1e-8
        finding = found(gradient_bottleneck, builder.build())
        assert finding.severity is Severity.WARNING
        assert "5 of their weights in effect stand still" in finding.message

    def test_a_weight_of_another_scale_is_named(self) -> None:
        builder = self.narrowed(1e3)
        builder.set("parameters", "weight_rms", "layers.5.weight", 1e-3)
        # rms·√64, of it and of the others: √2.
        assert "is 0.008, theirs 1.41" in found(gradient_bottleneck, builder.build()).remedies[0]

    @pytest.mark.parametrize("layer", [11, 12])
    def test_the_scale_of_the_loss_is_none(self, layer: int) -> None:
        # What the output layer loses (of its own gradient), or every layer.
        assert finding_of(gradient_bottleneck, self.narrowed(1e6, layer).build()) is None

    def test_a_chain_that_fades_evenly_is_none(self) -> None:
        # 0.005 per layer: each loses more than 100×, and so do its neighbours (GS101).
        assert finding_of(gradient_bottleneck, Chain(factor=0.005, loss=STUCK).run()) is None

    def test_branches_beside_the_chain_are_none(self) -> None:
        builder = Chain(loss=STUCK).builder()
        for layer in (0, 1, 4, 5, 8, 9):
            builder.arrays["modules"]["output_grad_norm"][:, 2 * layer] *= 1e-6
        # Queries and keys; without attention the first two would be the chain.
        assert finding_of(gradient_bottleneck, builder.build()) is not None
        attention = builder.entities["modules"][1]
        builder.entities["modules"][1] = replace(attention, type="MultiheadAttention")
        assert finding_of(gradient_bottleneck, builder.build()) is None

    def test_what_opens_soon_is_none(self) -> None:
        builder = Chain(loss=STUCK).builder()
        builder.arrays["modules"]["output_grad_norm"][:40, :10] *= 1e-6
        assert finding_of(gradient_bottleneck, builder.build()) is None

    @given(exponent=st.floats(-6, 6), seed=st.integers(0, 20))
    def test_neither_scale_nor_order_of_columns_matter(self, exponent: float, seed: int) -> None:
        builder = self.narrowed(1e3)
        whole = found(gradient_bottleneck, builder.build())
        builder.arrays["modules"]["output_grad_norm"] *= 10**exponent
        builder.scalars["loss"] *= 10**exponent
        other = found(gradient_bottleneck, builder.shuffled(seed).build())
        assert (other.layer, other.severity) == (whole.layer, whole.severity)
        assert other.evidence[0].observed == pytest.approx(whole.evidence[0].observed, rel=1e-4)


class TestSymmetry:
    def symmetric(self, share: float = 1.0, since: int = 0, **chain: Any) -> Builder:
        """Recorded at every step; all weights but the output layer's are copies of one row."""
        builder = Chain(**{"loss": (2.3, 1.9), "layers": 4, "steps": 30, **chain}).builder()
        for layer in range(4):
            value = np.where(builder.steps >= since, share if layer < 3 else 0.2, 0.0)
            name = f"layers.{layer}.weight"
            builder.set("parameters", "duplicate_rows_fraction", name, value)
        return builder

    def test_copies(self) -> None:
        finding = found(symmetric_weights, self.symmetric().build())
        assert (finding.severity, finding.layer) == (Severity.WARNING, "layers.0")
        assert "100% of the rows of layers.0.weight (and of 2 other weights)" in finding.message
        assert "from the first step on" in finding.message
        assert [evidence.entity for evidence in finding.evidence] == [
            f"layers.{layer}.weight" for layer in range(3)
        ]
        assert "layers.0 at random" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("loss", "severity"), [(STUCK, Severity.ERROR), ((2.3, 0.1), Severity.INFO)]
    )
    def test_severity_is_the_harm(self, loss: tuple[float, float], severity: Severity) -> None:
        builder = self.symmetric(steps=200, loss=loss)
        if loss[1] < 1:
            builder = falling(builder, to=0.01)
        assert found(symmetric_weights, builder.build()).severity is severity

    @pytest.mark.parametrize(("since", "expected"), [(25, True), (26, False)])
    def test_it_has_to_last(self, since: int, expected: bool) -> None:
        run = self.symmetric(since=since).build()
        assert (finding_of(symmetric_weights, run) is not None) is expected

    @pytest.mark.parametrize("share", [0.85, 0.0, np.nan])
    def test_few_copies_or_weights_of_zero_are_none(self, share: float) -> None:
        assert finding_of(symmetric_weights, self.symmetric(share).build()) is None

    def test_rows_that_part_are_none(self) -> None:
        builder = self.symmetric()
        builder.arrays["parameters"]["duplicate_rows_fraction"][-1] = 0
        assert finding_of(symmetric_weights, builder.build()) is None

    @pytest.mark.parametrize("quantity", ["grad_norm", "requires_grad", "in_optimizer"])
    def test_what_is_not_trained_is_not_judged(self, quantity: str) -> None:
        builder = self.symmetric()
        builder.arrays["parameters"][quantity][:] = 0
        assert finding_of(symmetric_weights, builder.build()) is None

    def test_the_output_layer_is_not_judged_alone(self) -> None:
        builder = self.symmetric(share=0.0)
        builder.set("parameters", "duplicate_rows_fraction", "layers.3.weight", 1.0)
        assert finding_of(symmetric_weights, builder.build()) is None

    @given(seed=st.integers(0, 20))
    def test_the_order_of_the_columns_does_not_matter(self, seed: int) -> None:
        builder = self.symmetric()
        whole = found(symmetric_weights, builder.build())
        assert found(symmetric_weights, builder.shuffled(seed).build()) == whole


def recurrent(factor: float, time: int = 60, *, each: int = 10, **chain: Any) -> Builder:
    """A layer whose gradient changes by a factor per time step; measured at every tenth step."""
    builder = Chain(**{"loss": STUCK, **chain}).builder()
    modules = builder.entities["modules"]
    modules.append(Entity("rnn", "module", (32, 64), 2048, -1, "recurrent", "RNN"))
    for quantity, values in builder.arrays["modules"].items():
        builder.arrays["modules"][quantity] = np.pad(
            values, ((0, 0), (0, 1)), constant_values=np.nan
        )
    at = np.where(builder.steps % each == 0, 1.0, np.nan)
    last = 1e-3
    for name, back in (("first", time - 1), ("middle", time - 1 - time // 2), ("last", 0)):
        builder.set("modules", f"time_grad_{name}", "rnn", at * last * factor**back)
    for name, value in (("time_steps", time), ("time_grad_nonfinite", 0)):
        builder.set("modules", name, "rnn", at * value)
    return builder


class TestVanishingThroughTime:
    def test_it_fades(self) -> None:
        finding = found(vanishing_through_time, recurrent(0.5).build())
        assert (finding.severity, finding.layer) == (Severity.WARNING, "rnn")
        assert finding.evidence[0].observed == pytest.approx(0.5**59, rel=1e-4)
        assert (finding.evidence[0].first_step, finding.evidence[0].last_step) == (0, 90)
        assert "a factor 0.5 per step" in finding.message

    @pytest.mark.parametrize(("decades", "expected"), [(2.9, False), (3.1, True)])
    def test_the_limit_is_where_it_is_said_to_be(self, decades: float, expected: bool) -> None:
        run = recurrent(10 ** (-decades / 59)).build()
        assert (finding_of(vanishing_through_time, run) is not None) is expected

    def test_a_task_without_long_memory_is_learned(self) -> None:
        for to in (0.5, 0.01):
            builder = falling(recurrent(0.5), to)
            assert found(vanishing_through_time, builder.build()).severity is Severity.INFO

    def test_a_loss_that_was_not_seen_proves_nothing(self) -> None:
        builder = recurrent(0.1)
        builder.scalars["loss"][:] = np.nan
        assert found(vanishing_through_time, builder.build()).severity is Severity.INFO

    @pytest.mark.parametrize(("fall", "severity"), [(0, "warning"), (0.3, "info")])
    def test_noise_hides_no_fall_that_is_not_there(self, fall: float, severity: str) -> None:
        # Squared errors of 32 normal numbers: too noisy to call the loss stuck.
        builder = recurrent(0.5, steps=300)
        errors = np.random.default_rng(1).normal(size=(300, 32))
        builder.scalars["loss"] = np.linspace(1, 1 - fall, 300) * (errors**2).mean(axis=1)
        assert found(vanishing_through_time, builder.build()).severity.value == severity

    def test_what_the_dtype_can_not_hold_has_faded(self) -> None:
        builder = recurrent(0.5)
        for name in ("time_grad_first", "time_grad_middle"):
            values = builder.arrays["modules"][name]
            values[:] = np.where(np.isnan(values), np.nan, 0)
        assert "less than its dtype holds" in found(vanishing_through_time, builder.build()).message

    def test_a_memory_that_opens_is_none(self) -> None:
        builder = recurrent(1.0)
        builder.arrays["modules"]["time_grad_first"][:40] *= 1e-9
        assert finding_of(vanishing_through_time, builder.build()) is None

    @pytest.mark.parametrize("middle", [1e-9, 1e3])
    def test_a_single_quiet_step_is_none(self, middle: float) -> None:
        # The first faded, but what is between did not, or more so.
        builder = recurrent(0.8)
        builder.arrays["modules"]["time_grad_middle"] *= middle
        assert finding_of(vanishing_through_time, builder.build()) is None

    def test_few_time_steps_are_none(self) -> None:
        assert finding_of(vanishing_through_time, recurrent(0.1, time=9).build()) is None

    @given(exponent=st.floats(-6, 6), seed=st.integers(0, 20))
    def test_neither_scale_nor_order_of_columns_matter(self, exponent: float, seed: int) -> None:
        builder = recurrent(0.7)
        whole = found(vanishing_through_time, builder.build())
        for name in ("first", "middle", "last"):
            builder.arrays["modules"][f"time_grad_{name}"] *= 10**exponent
        builder.scalars["loss"] *= 10**exponent
        other = found(vanishing_through_time, builder.shuffled(seed).build())
        assert (other.layer, other.severity) == (whole.layer, whole.severity)
        assert other.evidence[0].observed == pytest.approx(whole.evidence[0].observed, rel=1e-4)


class TestExplodingThroughTime:
    def test_it_grows(self) -> None:
        finding = found(exploding_through_time, recurrent(1.5).build())
        assert (finding.severity, finding.layer) == (Severity.ERROR, "rnn")
        assert finding.evidence[0].observed == pytest.approx(1.5**59, rel=1e-4)
        assert "1.5 per step, in 10 of 10 measurements" in finding.message

    @pytest.mark.parametrize(
        ("to", "factor", "severity"),
        [
            # 1e5-fold, then 1e10-fold; the converged one learned with it.
            (0.5, 10 ** (5 / 59), Severity.INFO),
            (0.5, 10 ** (10 / 59), Severity.WARNING),
            (0.01, 10 ** (10 / 59), Severity.INFO),
        ],
    )
    def test_severity_is_the_harm(self, to: float, factor: float, severity: Severity) -> None:
        builder = falling(recurrent(factor), to)
        assert found(exploding_through_time, builder.build()).severity is severity

    @pytest.mark.parametrize(("growth", "expected"), [(9e3, False), (1.1e4, True)])
    def test_a_sum_over_all_outputs_is_none(self, growth: float, expected: bool) -> None:
        # 1,000 steps: ten times their number, not 1e3.
        run = recurrent(growth ** (1 / 999), time=1000).build()
        assert (finding_of(exploding_through_time, run) is not None) is expected

    def test_an_overflow_counts_if_it_arose_inside(self) -> None:
        builder = falling(recurrent(1.0), to=0.5)
        builder.arrays["modules"]["time_grad_nonfinite"] *= 0
        builder.arrays["modules"]["time_grad_nonfinite"] += 7
        builder.set("modules", "output_grad_nonfinite", "rnn", 3)
        assert finding_of(exploding_through_time, builder.build()) is None
        builder.set("modules", "output_grad_nonfinite", "rnn", 0)
        finding = found(exploding_through_time, builder.build())
        assert finding.severity is Severity.WARNING
        assert "overflows on its way back through 60 time steps" in finding.message
        assert "in 10 of 10 measurements" in finding.message
        # Beside one that grows, where all of the first step's entries are gone.
        builder.arrays["modules"]["time_grad_first"][:50] = np.nan
        builder.arrays["modules"]["time_grad_first"][50:] *= 1e8
        finding = found(exploding_through_time, builder.build())
        assert finding.evidence[0].observed == pytest.approx(1e8, rel=1e-4)
        assert "and overflows in 10 of them" in finding.message

    def test_the_direction_that_is_worse_is_named(self) -> None:
        builder = recurrent(1.3)
        rnn = builder.entities["modules"][-1]
        builder.entities["modules"].append(replace(rnn, name="rnn#reverse"))
        for quantity, values in builder.arrays["modules"].items():
            column = values[:, -1:] * (1e3 if quantity == "time_grad_first" else 1)
            builder.arrays["modules"][quantity] = np.hstack([values, column])
        assert found(exploding_through_time, builder.build()).layer == "rnn#reverse"
