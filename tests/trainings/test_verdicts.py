"""Real trainings get the right verdict, their repaired twins and healthy ones none."""

import hashlib
from collections.abc import Callable

import pytest
import torch

from gradscope import Report
from tests.trainings import functional, programs, steps, tricky

FAULTY: dict[str, tuple[Callable[..., Report], str]] = {
    "circles_narrow_tanh": (programs.circles_narrow_tanh, "GS104"),
    "tiny_weights": (programs.tiny_weights, "GS104"),
    "dead_from_the_start": (programs.dead_from_the_start, "GS301"),
    "softmax_over_one_unit": (programs.softmax_over_one_unit, "GS604"),
    "head_only_in_optimizer": (programs.head_only_in_optimizer, "GS004"),
    "detached_encoder": (programs.detached_encoder, "GS002"),
    "generator_that_lost": (programs.generator_that_lost, "GS003"),
    "root_of_zero": (programs.root_of_zero, "GS503"),
    "dead_behind_a_falling_loss": (tricky.dead_behind_a_falling_loss, "GS301"),
    "logarithm_of_raw_scores": (tricky.logarithm_of_raw_scores, "GS604"),
    "head_replaced_in_training": (tricky.head_replaced_in_training, "GS008"),
    "nan_in_a_batch": (tricky.nan_in_a_batch, "GS607"),
    "rate_of_three": (steps.rate_of_three, "GS401"),
    "adam_rate_of_one": (steps.adam_rate_of_one, "GS401"),
    "unscaled_targets": (steps.unscaled_targets, "GS401"),
    "rate_raised_in_training": (steps.rate_raised_in_training, "GS401"),
    "rate_of_a_hundred_thousandth": (steps.rate_of_a_hundred_thousandth, "GS402"),
    "loss_in_tiny_units": (steps.loss_in_tiny_units, "GS402"),
    "killed_in_training": (steps.killed_in_training, "GS301"),
    "wide_weights_before_tanh": (steps.wide_weights_before_tanh, "GS302"),
    "half_dead": (steps.half_dead, "GS601"),
    "pixels_before_sigmoid": (steps.pixels_before_sigmoid, "GS302"),
    "dead_functional_relu": (functional.dead_functional_relu, "GS301"),
    "killed_functional_relu": (functional.killed_functional_relu, "GS401"),
    "wide_weights_before_functional_tanh": (
        functional.wide_weights_before_functional_tanh,
        "GS302",
    ),
}
HEALTHY: tuple[Callable[[], Report], ...] = (
    programs.deep_pre_norm,
    programs.low_rank_adapters,
    programs.rare_tokens,
    programs.unused_head,
    programs.bias_before_batchnorm,
    programs.accumulation,
    programs.converged,
    programs.plain_cnn,
    programs.small_learning_rate,
    programs.gan,
    tricky.experts_without_inputs,
    tricky.one_layer_per_domain,
    tricky.heads_in_phases,
    tricky.zero_head_in_warm_up,
    tricky.hinge_that_is_met,
    tricky.loss_with_a_constant,
    steps.large_first_steps,
    steps.rate_of_a_third_behind_norms,
    steps.tanh_to_its_ends,
    steps.open_gates,
    steps.fine_tuning,
    functional.functional_cnn,
    functional.functional_gelu_residual,
    functional.functional_gates,
    functional.functional_tanh,
    functional.functional_mixture,
    functional.small_gpt,
)


def complaints(report: Report) -> list[str]:
    # What was skipped because it failed would be silence for the wrong reason.
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert not report.run.meta["problems"]
    return [
        f"{finding.code} {finding.severity.value}: {finding.message}"
        for finding in report.findings
        if finding.severity.value != "info"
    ]


@pytest.mark.parametrize("name", FAULTY)
def test_the_fault_leads(name: str) -> None:
    program, code = FAULTY[name]
    torch.manual_seed(0)
    report = program()
    found = complaints(report)
    assert found
    assert report.findings[0].code == code, found
    assert len([finding for finding in report.roots if finding.severity.value != "info"]) == 1


# All but a few, chosen by a hash of the name, are left to `make test-slow`.
TWINS = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] if hashlib.sha256(name.encode()).digest()[0] % 3 else [],
        id=name,
    )
    for name in FAULTY
]


@pytest.mark.parametrize("name", TWINS)
def test_the_repaired_twin_is_healthy(name: str) -> None:
    program, _ = FAULTY[name]
    torch.manual_seed(0)
    assert complaints(program(repaired=True)) == []


def test_that_nothing_is_learned_is_all_that_is_known() -> None:
    torch.manual_seed(0)
    (complaint,) = complaints(steps.labels_that_say_nothing())
    assert complaint.startswith("GS203 warning")


@pytest.mark.parametrize("program", HEALTHY, ids=lambda program: program.__name__)
def test_healthy(program: Callable[[], Report]) -> None:
    torch.manual_seed(0)
    report = program()
    assert report.run.recorded_steps.size > 10
    assert complaints(report) == []
