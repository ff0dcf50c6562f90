"""GS303, GS306, GS307 and GS310 on runs with a known diagnosis."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Severity
from gradscope.analysis.rules.attention_collapse import attention_collapse
from gradscope.analysis.rules.attention_logit_growth import attention_logit_growth
from gradscope.analysis.rules.batchnorm_statistics_stale import batchnorm_statistics_stale
from gradscope.analysis.rules.constant_output import constant_output
from gradscope.analysis.rules.representation_collapse import representation_collapse
from gradscope.record import Run
from tests.analysis.additions import add
from tests.analysis.heads import recorded
from tests.analysis.synthetic import Builder, Chain
from tests.analysis.test_depth_rules import STUCK
from tests.analysis.test_structure_rules import LEARNING, found, normed

Fall = tuple[float, float]
STEPS = np.arange(100)


def answering(
    spread: object,
    fall: Fall = STUCK,
    *,
    inputs: float = 1.0,
    size: float = 1.0,
    shape: tuple[int, ...] = (32, 10),
) -> Builder:
    """A run whose outputs differ by this much from sample to sample."""
    builder = Chain(layers=4, loss=fall).builder()
    add(builder, "signals", "input", shape=(32, 64), sample_std=inputs, rms=1.0)
    return add(
        builder, "signals", "output", shape=shape, sample_std=spread, absmax=size, mean=size / 2
    )


class TestConstantOutput:
    @pytest.mark.parametrize(
        ("spread", "fall", "expected"),
        [
            (0.0, STUCK, Severity.ERROR),
            # Equal to the bit: what falls is the loss of the best constant.
            (0.0, LEARNING, Severity.WARNING),
            (0.9e-3, STUCK, Severity.ERROR),
            (0.9e-3, LEARNING, Severity.INFO),
            (1.1e-3, STUCK, None),
        ],
    )
    def test_the_limit_and_the_harm(
        self, spread: float, fall: Fall, expected: Severity | None
    ) -> None:
        findings = found(answering(spread, fall).build(), constant_output)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_a_head_that_starts_at_zero_is_constant_at_first_only(self) -> None:
        run = answering(np.where(STEPS < 30, 0.0, 0.1)).build()
        assert found(run, constant_output) == []

    def test_says_since_when(self) -> None:
        (finding,) = found(answering(np.where(STEPS < 70, 0.1, 0.0)).build(), constant_output)
        assert "equal to the bit (their mean is 0.5) from step 70 to step 99" in finding.message
        assert (finding.evidence[0].first_step, finding.evidence[0].last_step) == (70, 99)

    @pytest.mark.parametrize(
        ("inputs", "shape"), [(0.0, (32, 10)), (1.0, (1, 10)), (1.0, ())], ids=str
    )
    def test_what_can_not_differ_is_not_judged(self, inputs: float, shape: tuple[int, ...]) -> None:
        assert found(answering(0.0, inputs=inputs, shape=shape).build(), constant_output) == []

    def test_signals_of_the_first_steps_alone_are_judged(self) -> None:
        spread = np.where(STEPS < 8, 0.0, np.nan)
        (finding,) = found(answering(spread).build(), constant_output)
        assert finding.evidence[0].last_step == 7
        assert found(answering(np.where(STEPS < 4, 0.0, np.nan)).build(), constant_output) == []

    @given(st.floats(1e-4, 1e4), st.sampled_from([0.5e-3, 2e-3]))
    def test_is_the_same_at_any_scale_of_the_output(self, scale: float, relative: float) -> None:
        run = answering(relative * scale, size=scale).build()
        assert bool(found(run, constant_output)) is (relative < 1e-3)


def attending(
    quantity: str, values: object, fall: Fall = STUCK, *, layers: int = 2, keys: int = 16
) -> Builder:
    """A run with attention, whose weights over 16 keys are seen."""
    builder = Chain(layers=4, loss=fall).builder()
    for layer in range(layers):
        given: dict[str, Any] = {quantity: values}
        name = f"blocks.{layer}/softmax#0"
        shape = (8, 2, keys, keys)
        add(
            builder,
            "modules",
            name,
            group="attention",
            of="Softmax",
            shape=shape,
            depth=layer,
            **given,
        )
    return builder


class TestAttentionCollapse:
    @pytest.mark.parametrize(
        ("entropy", "fall", "expected"),
        [
            (0.09, STUCK, Severity.ERROR),
            (0.09, LEARNING, Severity.INFO),
            (0.11, STUCK, None),
            # A single key: there is nothing to choose from.
            (0.0, STUCK, None),
        ],
    )
    def test_one_key_for_each_query(
        self, entropy: float, fall: Fall, expected: Severity | None
    ) -> None:
        run = attending("attention_entropy", entropy, fall).build()
        findings = found(run, attention_collapse)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_names_the_first_layer_and_since_when(self) -> None:
        values = np.where(STEPS < 40, 2.5, 0.01)
        (finding,) = found(attending("attention_entropy", values).build(), attention_collapse)
        assert finding.layer == "blocks.0/softmax#0"
        assert "in 2 of 2 attention layers" in finding.message
        assert "since step 40 (it was 2.5 at first)" in finding.message
        assert "1.01 keys" in finding.message

    def test_one_of_several_layers_may_look_at_one_key(self) -> None:
        builder = attending("attention_entropy", 2.0, layers=3)
        builder.set("modules", "attention_entropy", "blocks.1/softmax#0", 0.01)
        assert found(builder.build(), attention_collapse) == []

    @pytest.mark.parametrize("most", [math.log(16), sum(map(math.log, range(1, 17))) / 16])
    def test_uniform_only_after_a_choice(self, most: float) -> None:
        # Every model begins with nearly uniform attention, with a causal mask or without.
        assert found(attending("attention_entropy", most).build(), attention_collapse) == []
        lost = np.where(STEPS < 50, 0.7 * most, 0.995 * most)
        (finding,) = found(attending("attention_entropy", lost).build(), attention_collapse)
        assert finding.severity is Severity.WARNING
        assert "all keys alike" in finding.message


class TestAttentionLogitGrowth:
    GROWN = np.geomspace(2, 2e4, 100)

    @pytest.mark.parametrize(
        ("values", "fall", "expected"),
        [
            (GROWN, STUCK, Severity.ERROR),
            # Above 10,000 something else must be what is learned …
            (GROWN, LEARNING, Severity.WARNING),
            # … below it may be in order.
            (GROWN / 10, LEARNING, Severity.INFO),
            (np.full(100, 120.0), STUCK, Severity.ERROR),
            (np.full(100, 90.0), STUCK, None),
            # From 80 to 160: twice is not an order of magnitude.
            (np.linspace(80, 160, 100), STUCK, None),
            # A spike that passes.
            (np.where(STEPS == 50, 1e4, 3.0), STUCK, None),
        ],
    )
    def test_the_limit_and_the_harm(
        self, values: object, fall: Fall, expected: Severity | None
    ) -> None:
        run = attending("attention_logit_max", values, fall).build()
        findings = found(run, attention_logit_growth)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_says_how_much_and_where(self) -> None:
        (finding,) = found(
            attending("attention_logit_max", self.GROWN).build(), attention_logit_growth
        )
        assert "blocks.0/softmax#0 (and in 1 more) reach 1.82e4" in finding.message
        assert "2.19 at first" in finding.message
        assert "queries and keys in blocks.0 " in finding.remedies[1]

    def test_a_bound_is_said_to_be_one(self) -> None:
        run = attending("attention_logit_bound", self.GROWN, LEARNING).build()
        (finding,) = found(run, attention_logit_growth)
        assert "may be up to" in finding.message
        assert finding.severity is Severity.INFO

    @pytest.mark.parametrize(("left", "severity"), [(0.9, Severity.INFO), (0.1, Severity.ERROR)])
    def test_attention_that_still_chooses_is_not_frozen(
        self, left: float, severity: Severity
    ) -> None:
        builder = attending("attention_logit_max", self.GROWN)
        for layer in (0, 1):
            entropy = np.linspace(2.0, 2.0 * left, 100)
            builder.set("modules", "attention_entropy", f"blocks.{layer}/softmax#0", entropy)
        (finding,) = found(builder.build(), attention_logit_growth)
        assert finding.severity is severity


ROSE = np.where(STEPS < 30, 0.5, 0.99995)


def alike(
    hidden: object,
    output: object,
    fall: Fall = STUCK,
    *,
    spread: float = 0.5,
    meta: dict[str, Any] | None = None,
) -> Builder:
    """Similarities from layers.2 on; and of the output."""
    builder = Chain(layers=4, loss=fall, meta=meta or {}).builder()
    builder.arrays["modules"]["output_sample_similarity"][:] = 0.5
    for name in ("layers.2", "layers.2.act"):
        builder.set("modules", "output_sample_similarity", name, hidden)
    for name in ("layers.3", "layers.3.act"):
        builder.set("modules", "output_sample_similarity", name, output)
    add(
        builder,
        "modules",
        "(root)",
        group="container",
        of="Sequential",
        depth=0,
        output_sample_similarity=output,
    )
    return add(builder, "signals", "input", shape=(32, 64), sample_std=spread, rms=1.0)


def distance(outputs: Tensor) -> Tensor:
    """Of two views, without targets."""
    return (outputs - 3 * outputs.detach().flip(0)).square().mean()


def classes(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(4))


class TestRepresentationCollapse:
    @pytest.mark.parametrize(
        ("similarity", "fall", "expected"),
        [
            (0.9995, STUCK, Severity.ERROR),
            (0.9995, LEARNING, Severity.INFO),
            (0.9985, STUCK, None),
            # Deep ReLU networks start so, and leave it.
            (np.where(STEPS < 30, 0.9995, 0.9), STUCK, None),
        ],
    )
    def test_samples_that_are_alike_from_the_start(
        self, similarity: object, fall: Fall, expected: Severity | None
    ) -> None:
        findings = found(alike(similarity, similarity, fall).build(), representation_collapse)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_names_the_first_layer_of_them(self) -> None:
        (finding,) = found(alike(0.9995, 0.9995).build(), representation_collapse)
        assert finding.layer == "layers.2"
        assert "0.9995, from the first step on" in finding.message
        assert "before layers.2" in finding.remedies[0]

    @pytest.mark.parametrize("hidden", [ROSE, 0.5])
    @pytest.mark.parametrize(
        ("output", "loss_of", "severities"),
        [
            (ROSE, distance, [Severity.WARNING]),
            (np.where(STEPS < 30, 0.5, 0.992), distance, [Severity.WARNING]),
            # Alike, but not so much; or from the start.
            (np.where(STEPS < 30, 0.5, 0.985), distance, []),
            (np.where(STEPS < 30, 0.95, 0.992), distance, []),
            # The frequencies of words are what every model learns first.
            (np.where(STEPS < 30, 0.5, 0.992), classes, []),
        ],
    )
    def test_a_loss_that_a_constant_solves(
        self,
        hidden: object,
        output: object,
        loss_of: Callable[[Tensor], Tensor],
        severities: list[Severity],
    ) -> None:
        outputs = torch.ones(4, 8, requires_grad=True) * 2
        meta = {"graph": recorded(loss_of(outputs), outputs)}
        hidden = 0.5 if not severities else hidden
        findings = found(
            alike(hidden, output, (2.0, 0.2), meta=meta).build(), representation_collapse
        )
        assert [finding.severity for finding in findings] == severities
        for finding in findings:
            assert "since step 30 (0.5 at first)" in finding.message
            assert "constant does not solve the loss" in finding.remedies[0]

    def test_targets_that_hardly_differ_make_outputs_alike(self) -> None:
        builder = alike(ROSE, ROSE, (2.0, 0.3))
        add(builder, "signals", "target", sample_std=1e-3)
        (finding,) = found(builder.build(), representation_collapse)
        assert finding.severity is Severity.INFO

    def test_where_the_loss_is_no_progress_the_output_alone_shows_it(self) -> None:
        run = alike(0.5, ROSE, LEARNING, meta={"loss_is_progress": False}).build()
        (finding,) = found(run, representation_collapse)
        assert finding.severity is Severity.WARNING

    def test_a_value_per_sample_has_no_direction(self) -> None:
        builder = alike(0.5, ROSE)
        for entities in builder.entities.values():
            entities[:] = [
                replace(e, shape=(32, 1), numel=32)
                if e.name in {"(root)", "layers.3", "layers.3.act"}
                else e
                for e in entities
            ]
        assert found(builder.build(), representation_collapse) == []

    def test_inputs_that_are_alike_stay_so(self) -> None:
        assert found(alike(0.9995, 0.9995, spread=0.01).build(), representation_collapse) == []


SICK: dict[str, tuple[Any, Builder]] = {
    "GS303": (constant_output, answering(0.0)),
    "GS306": (attention_collapse, attending("attention_entropy", 0.01)),
    "GS307": (attention_logit_growth, attending("attention_logit_max", 1e3)),
    "GS308": (batchnorm_statistics_stale, normed(8.0)),
    "GS310": (representation_collapse, alike(0.9995, 0.9995)),
}


@pytest.mark.parametrize("code", SICK)
@given(seed=st.integers(0, 1_000), scale=st.floats(1e-3, 1e3))
def test_neither_the_order_of_columns_nor_the_scale_of_the_loss_matters(
    code: str, seed: int, scale: float
) -> None:
    rule, builder = SICK[code]
    (before,) = found(builder.build(), rule)
    was = builder.scalars["loss"]
    builder.scalars["loss"] = was * scale
    (after,) = found(builder.shuffled(seed).build(), rule)
    builder.scalars["loss"] = was
    assert (after.severity, after.evidence[0].observed) == (
        before.severity,
        before.evidence[0].observed,
    )


def poor(builder: Builder, lack: str) -> Run:
    if lack == "NaN":
        for quantities in builder.arrays.values():
            for values in quantities.values():
                values[:] = np.nan
    run = builder.build()
    if lack == "one step":
        parameters, modules, signals = (
            replace(t, steps=t.steps[:1], values=t.values[:, :1])
            for t in (run.parameters, run.modules, run.signals)
        )
        scalars = {name: values[:1] for name, values in run.scalars.items()}
        return Run(parameters, modules, signals, run.steps[:1], scalars, run.meta)
    return run


@pytest.mark.parametrize("lack", ["NaN", "one step"])
@pytest.mark.parametrize("code", SICK)
def test_too_little_is_no_finding_and_no_failure(code: str, lack: str) -> None:
    rule, builder = SICK[code]
    copy = Builder(builder.steps, [], [], builder.meta)
    copy.entities = builder.entities
    copy.arrays = {t: {q: v.copy() for q, v in a.items()} for t, a in builder.arrays.items()}
    copy.scalars = builder.scalars
    report = analyze(poor(copy, lack), rules=[rule])
    assert report.findings == ()
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
