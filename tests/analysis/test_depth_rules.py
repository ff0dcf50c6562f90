"""GS101, GS102 and GS104 on runs with a known diagnosis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.analysis.finding import Finding, Severity
from gradscope.record import Run
from tests.analysis.synthetic import Chain, asked

STUCK = (2.31, 2.305)


def findings(run: Run) -> dict[str, Finding]:
    report = asked(run)
    # A rule that fails is skipped in a report; in a test it must not hide.
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    return {finding.code: finding for finding in report.findings}


def test_a_healthy_chain_is_silent() -> None:
    assert findings(Chain().run()) == {}


def test_a_sigmoid_chain_vanishes_and_its_weights_are_not_blamed() -> None:
    sick = Chain(factor=0.15, activation="Sigmoid", scale=0.577, loss=STUCK)
    found = findings(sick.run())
    assert list(found) == ["GS101"]
    finding = found["GS101"]
    assert finding.severity is Severity.ERROR
    assert finding.layer == "layers.0"
    evidence = finding.evidence[0]
    # 11 factors between the first and the last of 12 layers.
    assert evidence.observed == pytest.approx(0.15**11, rel=1e-3)
    assert evidence.observed < 1e-3 == evidence.limit
    assert (evidence.first_step, evidence.last_step) == (0, 99)
    assert "Sigmoid" in finding.remedies[0]
    assert "0.15 per layer" in finding.message


def test_weights_too_small_for_relu_explain_the_vanishing() -> None:
    # A third of He's scale passes on a third of the gradient.
    small = 2**0.5 / 3
    report = asked(Chain(factor=1 / 3, scale=small, loss=STUCK).run())
    assert [finding.code for finding in report.findings] == ["GS104", "GS101"]
    assert report.findings[1].explained_by == ("GS104",)
    assert "3 times too small for ReLU" in report.findings[0].message
    assert "kaiming_normal_" in report.findings[0].remedies[0]


def test_weights_too_large_for_tanh_explain_the_explosion() -> None:
    report = asked(Chain(factor=4.0, scale=4.0, activation="Tanh", loss=(9.0, 9.0)).run())
    assert [finding.code for finding in report.findings] == ["GS104", "GS102"]
    assert report.roots == report.findings[:1]
    assert "xavier_normal_" in report.findings[0].remedies[0]


def test_a_scale_that_does_not_explain_the_change_is_not_blamed() -> None:
    # Weights 1.6 times too large would enlarge the gradient; here it fades.
    run = Chain(factor=0.2, scale=1.6 * 2**0.5, loss=STUCK).run()
    assert set(findings(run)) == {"GS101"}


def test_a_scale_within_the_classical_schemes_is_not_blamed() -> None:
    run = Chain(factor=0.2, scale=1.0, loss=STUCK).run()
    assert set(findings(run)) == {"GS101"}


def test_a_tenfold_difference_is_no_finding() -> None:
    assert findings(Chain(factor=10 ** (-1 / 11), loss=STUCK).run()) == {}


@pytest.mark.parametrize(
    ("factor", "expected"), [(10 ** (-2.9 / 11), False), (10 ** (-3.1 / 11), True)]
)
def test_the_limit_is_where_it_is_said_to_be(factor: float, expected: bool) -> None:
    run = Chain(factor=factor, activation="Sigmoid", loss=STUCK).run()
    assert ("GS101" in findings(run)) is expected


def test_without_harm_it_is_information() -> None:
    # Adam-like: every layer moves, the loss falls.
    run = Chain(factor=0.3, activation="Sigmoid", updates_follow=False).run()
    assert findings(run)["GS101"].severity is Severity.INFO


def test_layers_that_stand_still_are_harm_though_the_loss_falls() -> None:
    run = Chain(factor=0.15, activation="Sigmoid").run()
    finding = findings(run)["GS101"]
    assert finding.severity is Severity.WARNING
    assert "stand still" in finding.message


def test_a_converged_run_is_healthy_however_small_its_gradients() -> None:
    builder = Chain(factor=0.15, activation="Sigmoid").builder()
    builder.scalars["loss"] = 2.3 * np.exp(-np.arange(100) / 20)
    assert findings(builder.build())["GS101"].severity is Severity.INFO


def test_without_a_loss_only_an_extreme_is_a_warning() -> None:
    for factor, severity in ((0.5, Severity.INFO), (0.15, Severity.WARNING)):
        chain = Chain(factor=factor, activation="Sigmoid", updates_follow=False)
        builder = chain.builder()
        builder.scalars["loss"][:] = np.nan
        finding = findings(builder.build())["GS101"]
        assert finding.severity is severity
        assert "not known" in finding.message


def test_a_loss_that_is_not_progress_proves_nothing() -> None:
    meta = {"loss_is_progress": False}
    chain = Chain(factor=0.15, activation="Sigmoid", updates_follow=False, loss=STUCK, meta=meta)
    assert findings(chain.run())["GS101"].severity is Severity.INFO


def test_fading_in_few_steps_is_not_persistent() -> None:
    builder = Chain(loss=STUCK).builder()
    builder.arrays["modules"]["output_grad_norm"][:40] *= np.repeat(
        0.1 ** np.arange(11, -1, -1.0), 2
    )
    assert findings(builder.build()) == {}


def test_three_layers_are_no_depth() -> None:
    assert findings(Chain(layers=3, factor=1e-4, loss=STUCK).run()) == {}


def test_explosion_is_judged_by_the_steps_before_the_numbers_broke() -> None:
    builder = Chain(factor=5.0, scale=5 * 2**0.5, loss=(1e9, 1e9)).builder()
    for table, quantity in (("parameters", "grad_nonfinite"), ("modules", "output_grad_nonfinite")):
        builder.arrays[table][quantity][1:] = 64
    for table, quantity in (("parameters", "grad_norm"), ("modules", "output_grad_norm")):
        builder.arrays[table][quantity][1:] = np.nan
    builder.scalars["loss"][1:] = np.nan
    builder.scalars["loss_nonfinite"][1:] = 1
    report = asked(builder.build())
    assert [finding.code for finding in report.findings] == ["GS104", "GS102", "GS501", "GS503"]
    assert [finding.severity for finding in report.findings] == [Severity.ERROR] * 4
    assert report.findings[3].explained_by == ("GS104", "GS102", "GS501")


@given(exponent=st.floats(-6, 6), factor=st.sampled_from([0.15, 1.0, 5.0]))
def test_the_verdict_does_not_depend_on_the_scale_of_the_loss(
    exponent: float, factor: float
) -> None:
    chain = Chain(factor=factor, scale=factor * 2**0.5, loss=(2.3, 2.3), loss_noise=0.0)
    builder = chain.builder()
    codes = set(findings(builder.build()))
    for table, quantity in (("parameters", "grad_norm"), ("modules", "output_grad_norm")):
        builder.arrays[table][quantity] *= 10**exponent
    builder.scalars["loss"] *= 10**exponent
    assert set(findings(builder.build())) == codes


@given(seed=st.integers(0, 100))
def test_the_verdict_does_not_depend_on_the_order_of_the_columns(seed: int) -> None:
    builder = Chain(factor=0.15, activation="Sigmoid", loss=STUCK).builder()
    whole = findings(builder.build())
    assert findings(builder.shuffled(seed).build()) == whole


def test_limits_can_be_overridden() -> None:
    run = Chain(factor=10 ** (-2.0 / 11), activation="Sigmoid", loss=STUCK).run()
    assert asked(run).healthy
    report = asked(run, limits={"GS101": {"decay": 0.1}})
    assert [finding.code for finding in report.findings] == ["GS101"]


def test_reuse_of_a_layer_is_not_depth() -> None:
    chain = Chain(layers=2, factor=1e-4, loss=STUCK)
    builder = chain.builder()
    first = builder.entities["modules"][0]
    for use in range(1, 9):
        builder.entities["modules"].append(
            replace(first, name=f"{first.name}#{use}", depth=9 + use)
        )
        for quantity, values in builder.arrays["modules"].items():
            builder.arrays["modules"][quantity] = np.hstack([values, values[:, :1] * 10.0**use])
    assert findings(builder.build()) == {}


def test_layers_beside_the_chain_are_not_its_depth() -> None:
    # Queries and keys of attention get little gradient while attention is nearly uniform.
    builder = Chain(loss=STUCK).builder()
    for layer in (0, 1, 4, 5, 8):
        builder.arrays["modules"]["output_grad_norm"][:, 2 * layer : 2 * layer + 2] *= 1e-5
    assert findings(builder.build()) == {}


def test_a_layer_that_loses_it_all_is_not_depth() -> None:
    # A zero-initialized head, say: everything behind it gets little, and evenly so.
    for layer in (3, 11):
        builder = Chain(loss=STUCK).builder()
        builder.arrays["modules"]["output_grad_norm"][:, : 2 * layer] *= 1e-6
        assert findings(builder.build()) == {}


def test_decay_beyond_the_dtype_is_still_decay() -> None:
    builder = Chain(layers=60, factor=0.15, activation="Sigmoid", loss=STUCK).builder()
    for table, quantity in (("modules", "output_grad_norm"), ("parameters", "grad_norm")):
        values = builder.arrays[table][quantity]
        values[values < 1e-38] = 0
    report = asked(builder.build())
    assert [finding.code for finding in report.findings] == ["GS101", "GS003"]
    assert report.findings[1].explained_by == ("GS101",)


def test_what_was_learning_until_a_nan_came_was_not_harmed_by_its_depth() -> None:
    builder = Chain(factor=5.0, scale=5 * 2**0.5, updates_follow=False).builder()
    builder.scalars["loss"][90:] = np.nan
    builder.scalars["loss_nonfinite"][90:] = 1
    found = findings(builder.build())
    assert found["GS501"].severity is Severity.ERROR
    assert found["GS501"].explained_by == ()
    assert found["GS104"].severity is Severity.INFO


def test_too_few_layers_are_said_to_be() -> None:
    report = asked(Chain(layers=3).run())
    reasons = {skip.code: skip.reason for skip in report.skipped}
    assert reasons["GS101"] == "3 layers with weights got a gradient, 4 are needed"


def test_outputs_that_start_inflated_are_harm_though_the_loss_falls() -> None:
    chain = Chain(factor=3.0, scale=3 * 2**0.5, loss=(3e6, 2e5), loss_noise=1e3)
    builder = replace(chain, updates_follow=False).builder()
    assert findings(builder.build())["GS104"].severity is Severity.INFO
    builder.set("modules", "output_rms", "layers.11", 1e4)
    report = asked(builder.build())
    assert [(f.code, f.severity.value) for f in report.findings] == [
        ("GS104", "warning"),
        ("GS102", "info"),
    ]


def test_an_extreme_decay_is_harm_though_the_output_layer_learns() -> None:
    chain = Chain(factor=0.15, activation="Sigmoid", updates_follow=False)
    assert findings(chain.run())["GS101"].severity is Severity.WARNING
    assert findings(replace(chain, factor=0.4).run())["GS101"].severity is Severity.INFO
