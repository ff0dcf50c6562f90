"""GS009 and GS010 on runs with a known diagnosis."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.eval_mode_in_training import eval_mode_in_training
from gradscope.analysis.rules.repeated_batch import repeated_batch
from gradscope.quantities import CATALOGUE
from gradscope.record import Entity
from tests.analysis.asking import loop, reason, said
from tests.analysis.synthetic import Builder
from tests.analysis.test_depth_rules import STUCK


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
        run = dropping(loop(), off_since(20), off_since(20)).build()
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
        assert said(dropping(loop(), mode, 1).build(), eval_mode_in_training) is None

    @pytest.mark.parametrize("group", ["Dropout", "BatchNorm2d"])
    def test_off_all_along_may_be_meant(self, group: str) -> None:
        run = dropping(loop(loss=STUCK), 0, 0, group=group).build()
        finding = said(run, eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_batch_norms_that_rest_from_some_step_on(self) -> None:
        run = dropping(loop(), off_since(20), group="BatchNorm2d").build()
        finding = said(run, eval_mode_in_training)
        assert finding is not None
        assert finding.severity is Severity.INFO

    def test_a_dropout_of_nothing_has_no_mode(self) -> None:
        builder = dropping(loop(dropout={"layers.0.act": 0.0}), off_since(20))
        assert said(builder.build(), eval_mode_in_training) is None

    def test_a_frozen_part_rests_in_order(self) -> None:
        builder = dropping(loop(), off_since(20))
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
        finding = said(new_norms(loop(loss=loss), rms).build(), eval_mode_in_training)
        assert finding is not None
        assert finding.severity is severity
        assert ("nothing is normalized" in finding.message) is (severity is Severity.WARNING)

    def test_norms_that_were_loaded_are_not_new(self) -> None:
        builder = new_norms(loop(loss=STUCK), 30.0)
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
        finding = said(fed(loop(), input=1, target=1).build(), repeated_batch)
        assert finding is not None
        assert finding.severity is Severity.INFO
        assert "a batch of 32" in finding.message
        assert "in all of 59 pairs" in finding.message

    def test_a_loader_that_got_stuck(self) -> None:
        run = fed(loop(), input=same_since(20), target=same_since(20)).build()
        finding = said(run, repeated_batch)
        assert finding is not None
        assert finding.severity is Severity.WARNING
        assert "since step 20" in finding.message

    def test_a_second_optimizer_may_work_on_all_of_the_data(self) -> None:
        meta: dict[str, Any] = {"coverage": {"optimizers": [{"type": "Adam"}, {"type": "LBFGS"}]}}
        finding = said(fed(loop(**meta), input=same_since(20)).build(), repeated_batch)
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
        finding = said(fed(loop(loss=loss), input=1, target=target).build(), repeated_batch)
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
        assert said(fed(loop(loss=STUCK), input=values).build(), repeated_batch) is None

    def test_too_few_pairs(self) -> None:
        run = fed(loop(8), input=1).build()
        assert "7 pairs" in reason(run, repeated_batch)
        run = fed(loop(), target=1).build()
        assert "0 pairs" in reason(run, repeated_batch)
