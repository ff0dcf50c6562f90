"""GS006, GS007, GS009 and GS010 on runs with a known diagnosis."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import SECTIONS, Rule
from gradscope.analysis.rules.eval_mode_in_training import eval_mode_in_training
from gradscope.analysis.rules.gradient_ascent import gradient_ascent
from gradscope.analysis.rules.gradients_not_cleared import gradients_not_cleared
from gradscope.analysis.rules.repeated_batch import repeated_batch
from gradscope.quantities import CATALOGUE
from gradscope.record import Entity, Run
from tests.analysis.synthetic import WIDTH, Builder, Chain
from tests.analysis.test_depth_rules import STUCK

Vectors = NDArray[np.float64]
RULES: tuple[Rule[Any], ...] = (
    gradients_not_cleared,
    gradient_ascent,
    eval_mode_in_training,
    repeated_batch,
)
LAYERS = 4


def said(run: Run, rule: Rule[Any]) -> Finding | None:
    report = analyze(run, rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert len(report.findings) <= 1
    return report.findings[0] if report.findings else None


def reason(run: Run, rule: Rule[Any]) -> str:
    (skip,) = analyze(run, rules=[rule]).skipped
    return skip.reason


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


def chain(steps: int = 60, loss: tuple[float, float] = (2.3, 1.8), **meta: Any) -> Builder:
    return Chain(layers=LAYERS, steps=steps, loss=loss, meta=meta).builder()


def trained_by(**optimizer: Any) -> dict[str, Any]:
    return {"coverage": {"optimizers": [{"type": "SGD", **optimizer}]}}


class TestGradientsNotCleared:
    @pytest.mark.parametrize("gradients", [summed, summed_and_clipped, summed_between(10)])
    @pytest.mark.parametrize("common", [0.0, 0.3, 30.0])
    def test_what_is_never_cleared(
        self, gradients: Callable[[Vectors], Vectors], common: float
    ) -> None:
        run = balanced(chain(), gradients, arriving(60, common))
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
        run = balanced(chain(), summed_between(10), arriving(60, 1e3))
        finding = said(run, gradients_not_cleared)
        assert finding is not None
        assert "up to 10 times as long" in finding.message

    def test_a_stuck_loss_makes_it_an_error(self) -> None:
        finding = said(balanced(chain(loss=STUCK), summed, arriving(60)), gradients_not_cleared)
        assert finding is not None
        assert finding.severity is Severity.ERROR

    @pytest.mark.parametrize(
        "gradients", [cleared, clipped, noisy, with_momentum, sharpness_aware, negated]
    )
    @pytest.mark.parametrize("common", [0.0, 0.3, 3.0, 100.0, 1e4])
    def test_what_is_cleared(self, gradients: Callable[[Vectors], Vectors], common: float) -> None:
        # Up to the same gradient at every step, as in full batches that stand still.
        run = balanced(chain(loss=STUCK), gradients, arriving(60, common))
        assert said(run, gradients_not_cleared) is None

    def test_a_bias_in_front_of_a_norm_has_no_say(self) -> None:
        arrived = arriving(60)
        builder = recorded(chain(), summed(arrived), arrived)
        for quantity, value in (("grad_norm", 1e-9), ("grad_balance", 0.01)):
            builder.set("parameters", quantity, "layers.1.bias", value)
        whole = said(builder.build(), gradients_not_cleared)
        assert whole is not None
        assert whole.evidence[0].observed == 1.0

    def test_steps_that_do_not_follow_each_other_can_t_be_compared(self) -> None:
        builder = recorded(chain(), summed(arriving(60)), arriving(60))
        builder.steps = builder.steps * 2
        assert "could be held against" in reason(builder.build(), gradients_not_cleared)

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        arrived = arriving(20) * 10**scale
        builder = recorded(chain(20), summed(arrived), arrived)
        builder.scalars["loss"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), gradients_not_cleared)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert finding.evidence[0].observed == pytest.approx(1.0)


class TestGradientAscent:
    def test_gradients_that_were_negated(self) -> None:
        run = balanced(chain(loss=(2.3, 9.0)), negated, arriving(60))
        finding = said(run, gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert finding.evidence[0].observed == pytest.approx(-1.0)

    def test_and_clipped(self) -> None:
        run = balanced(chain(loss=(2.3, 9.0)), lambda a: negated(clipped(a)), arriving(60))
        finding = said(run, gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR

    def test_a_loss_that_falls_all_the_same_makes_it_information(self) -> None:
        finding = said(balanced(chain(), negated, arriving(60)), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_negated_and_maximized_is_descent(self) -> None:
        builder = recorded(chain(**trained_by(maximize=True)), -arriving(60), arriving(60))
        assert said(builder.build(), gradient_ascent) is None

    def test_a_branch_that_is_reversed_is_a_technique(self) -> None:
        given = arriving(60)
        given[:, 0] *= -1
        builder = recorded(chain(loss=(2.3, 9.0)), given, arriving(60))
        assert said(builder.build(), gradient_ascent) is None

    @pytest.mark.parametrize("gradients", [cleared, clipped, noisy, summed])
    def test_a_gradient_with_its_own_sign(self, gradients: Callable[[Vectors], Vectors]) -> None:
        run = balanced(chain(loss=(2.3, 9.0)), gradients, arriving(60))
        assert said(run, gradient_ascent) is None

    def test_steps_along_the_gradient(self) -> None:
        builder = chain(loss=(2.3, 9.0))
        builder.arrays["parameters"]["update_gradient_cosine"][:] = 1.0
        finding = said(builder.build(), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "from 2.3" in finding.message

    def test_that_were_asked_for(self) -> None:
        builder = chain(loss=(2.3, 9.0), **trained_by(maximize=True))
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
        builder = chain(loss=(2.3, end))
        builder.arrays["parameters"]["update_gradient_cosine"][:] = cosine
        builder.arrays["parameters"]["update_gradient_cosine"][0] = begin
        assert said(builder.build(), gradient_ascent) is None

    def test_weight_decay_goes_where_the_weights_are(self) -> None:
        # A change of 1e-3 of the weights, all of it decay.
        decay = trained_by(type="AdamW", weight_decay=1.0)
        builder = chain(loss=(2.3, 9.0), **decay)
        builder.scalars["learning_rate"][:] = 1e-3
        builder.arrays["parameters"]["update_gradient_cosine"][:] = 0.5
        assert said(builder.build(), gradient_ascent) is None
        builder.scalars["learning_rate"][:] = 1e-5
        assert said(builder.build(), gradient_ascent) is not None

    @given(scale=st.floats(-6, 6), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_neither_the_loss_s_scale_nor_the_order_matters(self, scale: float, seed: int) -> None:
        arrived = arriving(30) * 10**scale
        builder = recorded(chain(30, loss=(2.3, 9.0)), -arrived, arrived)
        builder.scalars["loss"] *= 10**scale
        finding = said(builder.shuffled(seed).build(), gradient_ascent)
        assert finding is not None
        assert finding.severity is Severity.ERROR


def dropping(builder: Builder, *modes: object, group: str = "Dropout") -> Builder:
    """The activations are dropouts (or batch norms) in these modes."""
    entities = builder.entities["modules"]
    for layer, mode in enumerate(modes):
        at = builder.at("modules", f"layers.{layer}.act")
        entities[at] = replace(entities[at], type=group, group=group.lower())
        builder.set("modules", "training", f"layers.{layer}.act", mode)
    return builder


def off_since(step: int, steps: int = 60) -> NDArray[np.float64]:
    return np.where(np.arange(steps) < step, 1.0, 0.0)


def new_norms(builder: Builder, rms: float) -> Builder:
    """Batch norms of 64 channels that were never in training mode."""
    dropping(builder, 0, 0, group="BatchNorm1d")
    for layer in range(2):
        builder.set("modules", "buffer_norm", f"layers.{layer}.act", 8.0)
        builder.set("modules", "output_rms", f"layers.{layer}.act", rms)
    return builder


class TestEvalModeInTraining:
    def test_dropout_that_stays_off_after_a_validation(self) -> None:
        run = dropping(chain(), off_since(20), off_since(20)).build()
        finding = said(run, eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert "2 dropouts" in finding.message
        assert "since step 20, and in training mode before" in finding.message
        assert finding.evidence[0].first_step == 20
        assert "model.train()" in finding.remedies[0]

    @pytest.mark.parametrize(
        "mode",
        [
            1,
            # Off now and then, as for adversarial inputs; and at the very end.
            np.tile([1.0, 0.0], 30),
            off_since(56),
        ],
    )
    def test_dropout_that_is_on(self, mode: object) -> None:
        assert said(dropping(chain(), mode, 1).build(), eval_mode_in_training) is None

    @pytest.mark.parametrize("group", ["Dropout", "BatchNorm2d"])
    def test_off_all_along_may_be_meant(self, group: str) -> None:
        run = dropping(chain(loss=STUCK), 0, 0, group=group).build()
        finding = said(run, eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_batch_norms_that_rest_from_some_step_on(self) -> None:
        run = dropping(chain(), off_since(20), group="BatchNorm2d").build()
        finding = said(run, eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_a_dropout_of_nothing_has_no_mode(self) -> None:
        builder = dropping(chain(dropout={"layers.0.act": 0.0}), off_since(20))
        assert said(builder.build(), eval_mode_in_training) is None

    def test_a_frozen_part_rests_in_order(self) -> None:
        builder = dropping(chain(), off_since(20))
        for leaf in ("weight", "bias"):
            builder.set("parameters", "requires_grad", f"layers.0.{leaf}", 0)
        finding = said(builder.build(), eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO
        assert "in order" in finding.message

    @pytest.mark.parametrize(
        ("rms", "loss", "severity"),
        [
            (30.0, (2.3, 1.8), Severity.WARNING),
            (0.01, (2.3, 1.8), Severity.WARNING),
            (1.0, STUCK, Severity.WARNING),
            (1.0, (2.3, 1.8), Severity.INFO),
            (30.0, (2.3, -0.2), Severity.INFO),
        ],
    )
    def test_norms_that_never_saw_a_batch(
        self, rms: float, loss: tuple[float, float], severity: Severity
    ) -> None:
        finding = said(new_norms(chain(loss=loss), rms).build(), eval_mode_in_training)
        assert finding is not None
        assert finding.severity is severity
        assert ("nothing is normalized" in finding.message) is (severity is Severity.WARNING)

    def test_norms_that_were_loaded_are_not_new(self) -> None:
        builder = new_norms(chain(loss=STUCK), 30.0)
        for layer in range(2):
            builder.set("modules", "buffer_norm", f"layers.{layer}.act", 8.01)
        finding = said(builder.build(), eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO


def fed(builder: Builder, **repeated: object) -> Builder:
    """Signals that repeat so, of a batch of 32."""
    names = list(repeated)
    builder.entities["signals"] = [
        Entity(name, "signal", (32, 64), 32 * 64, 0, "signal", "Tensor") for name in names
    ]
    builder.arrays["signals"] = {
        quantity.name: np.full((len(builder.steps), len(names)), np.nan)
        for quantity in CATALOGUE["signals"]
    }
    for name, values in repeated.items():
        builder.set("signals", "repeated", name, values)
        builder.arrays["signals"]["repeated"][0] = np.nan
    return builder


def same_since(step: int, steps: int = 60) -> NDArray[np.float64]:
    return 1 - off_since(step, steps)


class TestRepeatedBatch:
    def test_one_batch_all_along_may_be_all_of_the_data(self) -> None:
        finding = said(fed(chain(), input=1, target=1).build(), repeated_batch)
        assert finding is not None
        assert finding.severity is Severity.INFO
        assert "a batch of 32" in finding.message
        assert "in all of 59 pairs" in finding.message

    def test_a_loader_that_got_stuck(self) -> None:
        run = fed(chain(), input=same_since(20), target=same_since(20)).build()
        finding = said(run, repeated_batch)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert "since step 20" in finding.message

    def test_a_second_optimizer_may_work_on_all_of_the_data(self) -> None:
        meta: dict[str, Any] = {"coverage": {"optimizers": [{"type": "Adam"}, {"type": "LBFGS"}]}}
        finding = said(fed(chain(**meta), input=same_since(20)).build(), repeated_batch)
        assert finding is not None
        assert finding.severity is Severity.INFO

    @pytest.mark.parametrize(
        ("target", "loss", "severity"),
        [
            (0, STUCK, Severity.WARNING),
            (0, (2.3, 1.8), Severity.INFO),
            (1, STUCK, Severity.INFO),
            (np.nan, STUCK, Severity.INFO),
        ],
    )
    def test_a_stale_input_leaves_nothing_to_learn(
        self, target: float, loss: tuple[float, float], severity: Severity
    ) -> None:
        finding = said(fed(chain(loss=loss), input=1, target=target).build(), repeated_batch)
        assert finding is not None
        assert finding.severity is severity
        assert ("while the target varied" in finding.message) is (target == 0)

    @pytest.mark.parametrize(
        "values",
        [
            0,
            # Four steps on each batch; a last step twice.
            np.tile([0.0, 1.0, 1.0, 1.0], 15),
            same_since(55),
        ],
    )
    def test_batches_that_vary(self, values: object) -> None:
        assert said(fed(chain(loss=STUCK), input=values).build(), repeated_batch) is None

    def test_too_few_pairs(self) -> None:
        run = fed(chain(8), input=1).build()
        assert "7 pairs" in reason(run, repeated_batch)
        run = fed(chain(), target=1).build()
        assert "0 pairs" in reason(run, repeated_batch)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_nothing_known_is_no_finding(rule: Rule[Any], steps: int) -> None:
    builder = fed(chain(max(steps, 1)), input=np.nan, target=np.nan)
    for arrays in builder.arrays.values():
        for quantity, values in arrays.items():
            arrays[quantity] = np.full((steps, values.shape[1]), np.nan)
    builder.steps = np.arange(steps)
    builder.scalars = {name: np.full(steps, np.nan) for name in builder.scalars}
    assert reason(builder.build(), rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
@pytest.mark.parametrize("holes", [0.1, 0.5, 0.9])
def test_holes_are_no_crash(rule: Rule[Any], holes: float) -> None:
    arrived = arriving(60)
    builder = fed(recorded(chain(), summed(arrived), arrived), input=1, target=0)
    dropping(builder, 0, off_since(9))
    draw = np.random.default_rng(0)
    for arrays in builder.arrays.values():
        for values in arrays.values():
            values[draw.random(values.shape) < holes] = np.nan
    report = analyze(builder.build(), rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_its_page_is_whole(rule: Rule[Any]) -> None:
    assert all(rule.section(title) for title in SECTIONS)
