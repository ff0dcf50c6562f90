"""GS204 on trainings that clip, in one way or another, and on some whose norms stand still."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.report import Report
from gradscope.capture.scope import Scope, watch
from tests.capture.trainings import mlp_model, vectors

STEPS = 40

# Does with the gradients what a loop does between backward and step.
Between = Callable[[nn.Module, Scope], None]


def cross_entropy(model: nn.Module) -> Tensor:
    x, y = vectors()
    return F.cross_entropy(model(x), y)


def trained(
    between: Between,
    *,
    steps: int = STEPS,
    rate: float = 0.01,
    loss_of: Callable[[nn.Module], Tensor] = cross_entropy,
    build: Callable[[], nn.Module] = mlp_model,
    **options: Any,
) -> Report:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with watch(model, optimizer, **{"every": 1, **options}) as scope:
        for number in range(steps):
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            between(model, scope)
            optimizer.step()
            scope.log(loss=loss)
        return analyze(scope.run())


def found(report: Report) -> Finding | None:
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    of_clipping = [finding for finding in report.findings if finding.code == "GS204"]
    # Whatever is found of clipping harms nobody.
    assert all(finding.severity is Severity.INFO for finding in of_clipping)
    return of_clipping[0] if of_clipping else None


def norm_of(model: nn.Module) -> float:
    entries = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    return float(entries.double().square().sum().sqrt())


def clip_at(limit: float) -> Between:
    def clip(model: nn.Module, scope: Scope) -> None:
        del scope
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    return clip


def untouched(model: nn.Module, scope: Scope) -> None:
    del model, scope


@pytest.mark.parametrize("factor", [1.0, 1e6])
@pytest.mark.parametrize("limit", [0.01, 1e-1])
def test_clipping_that_gradscope_is_not_told_of(limit: float, factor: float) -> None:
    report = trained(clip_at(limit), loss_of=lambda model: cross_entropy(model) * factor, rate=1e-6)
    finding = found(report)
    assert finding is not None
    assert f"global norm is {limit:.4g} in 40 of 40 recorded steps" in finding.message
    assert "scope.clip_grad_norm_ or log(grad_norm=...)" in finding.message
    assert finding.span == (0, STEPS - 1)


def test_only_the_clipped_steps_are_counted() -> None:
    norms: list[float] = []
    trained(lambda model, _: norms.append(norm_of(model)))
    # Two in five are below: those are not clipped.
    limit = sorted(norms)[16]
    clipped: list[bool] = []

    def clip(model: nn.Module, scope: Scope) -> None:
        del scope
        clipped.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)) > limit)

    finding = found(trained(clip))
    assert finding is not None
    assert STEPS / 2 < sum(clipped) < STEPS
    assert abs(int(finding.message.split(" in ")[1].split()[0]) - sum(clipped)) <= 1


def test_clipping_of_a_few_steps_is_nothing() -> None:
    norms: list[float] = []
    trained(lambda model, _: norms.append(norm_of(model)))
    assert found(trained(clip_at(sorted(norms)[30]))) is None


def test_normalized_gradients_look_the_same() -> None:
    def normalize(model: nn.Module, scope: Scope) -> None:
        del scope
        norm = norm_of(model)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= norm

    finding = found(trained(normalize))
    assert finding is not None
    assert "clipped, or normalized," in finding.message


def test_one_parameter_alone() -> None:
    finding = found(trained(clip_at(0.01), build=lambda: nn.Linear(6, 5, bias=False)))
    assert finding is not None


def test_no_clipping() -> None:
    assert found(trained(untouched)) is None


def test_few_steps_say_nothing() -> None:
    report = trained(clip_at(0.01), steps=19)
    assert found(report) is None
    assert ("GS204", "the gradient's norm is known of 19 steps, 20 are needed") in [
        (skip.code, skip.reason) for skip in report.skipped
    ]


def linear(model: nn.Module) -> Tensor:
    """A loss whose gradient is the same, whatever the weights."""
    output: Tensor = model(torch.arange(12.0).reshape(2, 6))
    return output.sum()


def test_gradient_that_never_changes() -> None:
    assert found(trained(untouched, loss_of=linear, build=lambda: nn.Linear(6, 5))) is None


def full_batch(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    return cross_entropy(model)


def test_full_batch_that_stands_still() -> None:
    assert found(trained(untouched, loss_of=full_batch, rate=1e-12)) is None


def test_full_batch_that_converges() -> None:
    assert found(trained(untouched, loss_of=full_batch, rate=0.5, steps=300)) is None


def test_norms_that_are_told_are_not_guessed_at() -> None:
    def clip(model: nn.Module, scope: Scope) -> None:
        del model
        scope.clip_grad_norm_(0.01)

    finding = found(trained(clip, every=5))
    assert finding is not None
    assert "100% of 40 steps were clipped" in finding.message
    assert "looks" not in finding.message


def test_norms_that_the_user_tells() -> None:
    norms: list[float] = []

    def clip(model: nn.Module, scope: Scope) -> None:
        norms.append(norm_of(model))
        scope.log(grad_norm=nn.utils.clip_grad_norm_(model.parameters(), 0.01))

    finding = found(trained(clip))
    assert finding is not None
    assert "100% of 40 steps were clipped" in finding.message
    middle = sum(sorted(norms)[19:21]) / 2
    assert f"was {middle:.3g} in the median" in finding.message


def test_clipping_that_seldom_happens() -> None:
    def clip(model: nn.Module, scope: Scope) -> None:
        del model
        scope.clip_grad_norm_(1e3)

    assert found(trained(clip)) is None
