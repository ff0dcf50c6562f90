"""GS603, GS604 and GS605 on the graphs of real losses."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.analysis.rules.initial_loss_off import initial_loss_off
from gradscope.analysis.rules.loss_shape_mismatch import loss_shape_mismatch
from gradscope.analysis.rules.output_activation_mismatch import output_activation_mismatch
from gradscope.record import Run
from tests.analysis.heads import LABELS, headed, signalled
from tests.analysis.synthetic import Builder

Loss = Callable[[Tensor], Tensor]

LEARNING, STUCK, CONVERGED = (2.3, 1.6), (2.31, 2.305), (2.3, -0.1)
ONE_HOT = F.one_hot(LABELS, 10).float()
Y = torch.linspace(0, 1, 8)
SCORES = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 10))
ONE = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def ending(activation: nn.Module, net: nn.Sequential = SCORES) -> nn.Sequential:
    return nn.Sequential(*net, activation)


def found(rule: Rule[Any], run: Run) -> Finding | None:
    report = analyze(run, rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert len(report.findings) <= 1
    return report.findings[0] if report.findings else None


def cross_entropy(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, LABELS)


def by_hand(probabilities: Tensor) -> Tensor:
    clipped = probabilities.clamp(1e-7, 1 - 1e-7)
    return -(ONE_HOT * clipped.log()).sum(1).mean()


def renormalized(scores: Tensor) -> Tensor:
    return by_hand(scores / scores.sum(1, keepdim=True))


def binary_by_hand(scores: Tensor) -> Tensor:
    return (-ONE_HOT * scores.log() - (1 - ONE_HOT) * (1 - scores).log()).sum(1).mean()


class TestOutputActivation:
    @pytest.mark.parametrize(
        ("activation", "best"),
        [
            (nn.Softmax(1), 1e3 * ONE_HOT),
            (nn.Sigmoid(), 2e3 * ONE_HOT - 1e3),
            (nn.Tanh(), 2e3 * ONE_HOT - 1e3),
        ],
    )
    @pytest.mark.parametrize(("fall", "severity"), [(LEARNING, "warning"), (STUCK, "error")])
    def test_a_bounded_output_taken_for_logits(
        self, activation: nn.Module, best: Tensor, fall: tuple[float, float], severity: str
    ) -> None:
        finding = found(
            output_activation_mismatch,
            headed(ending(activation), cross_entropy, loss=fall).build(),
        )
        assert finding is not None
        assert finding.severity.value == severity
        # The floor, from the best output that there is.
        floor = F.cross_entropy(activation(best), LABELS).item()
        assert finding.evidence[0].observed == pytest.approx(floor, rel=1e-5)
        assert f"can't fall below {floor:.3g}" in finding.message

    @pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softmax(1)])
    def test_a_second_sigmoid(self, activation: nn.Module) -> None:
        def loss(scores: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(scores, ONE_HOT)

        finding = found(output_activation_mismatch, headed(ending(activation), loss).build())
        assert finding is not None
        floor = F.binary_cross_entropy_with_logits(torch.ones(1), torch.ones(1)).item()
        assert finding.evidence[0].observed == pytest.approx(floor, rel=1e-5)
        assert "binary_cross_entropy" in finding.remedies[0]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda p: F.binary_cross_entropy(p, Y[:, None].round()),
            lambda p: F.mse_loss(p, Y[:, None]),
            lambda p: -(Y[:, None] * p.clamp(1e-7, 1 - 1e-7).log()).mean(),
        ],
    )
    def test_a_softmax_over_one_unit_is_a_constant(self, loss: Loss) -> None:
        model = ending(nn.Softmax(1), ONE)
        finding = found(output_activation_mismatch, headed(model, loss, loss=(50, 50)).build())
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "over a single unit" in finding.message
        assert "binary_cross_entropy_with_logits" in finding.remedies[0]

    def test_a_cross_entropy_of_one_class_is_zero_and_no_success(self) -> None:
        def loss(scores: Tensor) -> Tensor:
            return F.cross_entropy(scores, torch.zeros(8, dtype=torch.int64))

        builder = headed(ONE, loss)
        builder.scalars["loss"][:] = 0
        finding = found(output_activation_mismatch, builder.build())
        assert finding is not None
        assert finding.severity is Severity.ERROR

    @pytest.mark.parametrize(
        ("model", "loss", "words"),
        [
            (SCORES, lambda z: F.nll_loss(z.log_softmax(0), LABELS), "over the batch"),
            (ending(nn.Softmax(0)), lambda p: F.nll_loss(p.log(), LABELS), "over the batch"),
            (SCORES, lambda z: F.nll_loss((z.softmax(0) + 1e-9).log(), LABELS), "over the batch"),
            (ending(nn.Softmax(0)), lambda p: F.mse_loss(p, ONE_HOT), "over the batch"),
            (
                SCORES,
                lambda z: F.nll_loss(z.view(4, 4, 5).log_softmax(1).view(16, 5), LABELS.repeat(2)),
                "over dimension 1 of [4, 4, 5] instead of the 5 classes",
            ),
        ],
    )
    def test_a_softmax_over_the_wrong_dimension(
        self, model: nn.Module, loss: Loss, words: str
    ) -> None:
        builder = signalled(headed(model, loss), "input", (8, 5))
        finding = found(output_activation_mismatch, builder.build())
        assert finding is not None
        assert words in finding.message
        assert finding.severity is Severity.WARNING

    @pytest.mark.parametrize(
        ("model", "words"),
        [(ending(nn.Softmax(1)), "without its logarithm"), (SCORES, "has no lower bound")],
    )
    def test_a_likelihood_of_what_is_no_logarithm(self, model: nn.Module, words: str) -> None:
        run = headed(model, lambda z: F.nll_loss(z, LABELS)).build()
        finding = found(output_activation_mismatch, run)
        assert finding is not None
        assert words in finding.message
        assert "log_softmax" in finding.remedies[1]

    @pytest.mark.parametrize(
        ("model", "loss", "kind"),
        [
            (ending(nn.ReLU()), renormalized, "rectified"),
            (SCORES, binary_by_hand, "raw"),
            (SCORES, by_hand, "raw"),
            (SCORES, renormalized, "raw"),
        ],
    )
    def test_a_logarithm_of_scores_breaks(self, model: nn.Module, loss: Loss, kind: str) -> None:
        builder = headed(model, loss)
        # What learns, if only so far, is not harmed.
        finding = found(output_activation_mismatch, builder.build())
        assert finding is not None
        assert finding.severity is Severity.INFO
        builder.scalars["loss"][60:] = math.nan
        builder.scalars["loss_nonfinite"][60:] = 1
        finding = found(output_activation_mismatch, builder.build())
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert f"logarithm of {kind} scores" in finding.message
        assert "F.cross_entropy" in finding.remedies[0]

    @pytest.mark.parametrize(("fall", "severity"), [(LEARNING, "info"), (STUCK, "error")])
    def test_rectified_logits(self, fall: tuple[float, float], severity: str) -> None:
        run = headed(ending(nn.ReLU()), cross_entropy, loss=fall).build()
        finding = found(output_activation_mismatch, run)
        assert finding is not None
        assert finding.severity.value == severity
        assert finding.layer == "layers.3.act"

    @pytest.mark.parametrize(
        ("activation", "target", "sick"),
        [
            (nn.Sigmoid(), {"mean": 3.0, "std": 2.0, "min": 0.0, "max": 9.0}, True),
            (nn.Tanh(), {"mean": 0.0, "std": 1.3, "min": -3.0, "max": 3.0}, True),
            (nn.ReLU(), {"mean": 0.0, "std": 1.0, "min": -2.0, "max": 2.0}, True),
            # Within, and a little beyond.
            (nn.Sigmoid(), {"mean": 0.5, "std": 0.5, "min": 0.0, "max": 1.0}, False),
            (nn.Tanh(), {"mean": 0.0, "std": 0.6, "min": -1.2, "max": 1.1}, False),
            (nn.ReLU(), {"mean": 5.0, "std": 2.0, "min": -0.1, "max": 9.0}, False),
            (nn.Identity(), {"mean": 300.0, "std": 20.0, "min": 0.0, "max": 900.0}, False),
        ],
    )
    @pytest.mark.parametrize(
        "loss",
        [
            lambda p: F.mse_loss(p, Y[:, None]),
            lambda p: F.l1_loss(p, Y[:, None]),
            lambda p: ((p.squeeze(1) - Y) ** 2).mean(),
        ],
    )
    def test_targets_beyond_the_outputs_range(
        self, activation: nn.Module, target: dict[str, float], sick: bool, loss: Loss
    ) -> None:
        builder = signalled(headed(ending(activation, ONE), loss), "target", (8, 1), **target)
        finding = found(output_activation_mismatch, builder.build())
        assert (finding is not None) is sick
        if finding is not None:
            assert finding.severity is Severity.WARNING
            assert finding.evidence[0].observed in {target["min"], target["max"]}

    @pytest.mark.parametrize(
        ("model", "loss"),
        [
            (SCORES, cross_entropy),
            (ending(nn.LogSoftmax(1)), lambda z: F.nll_loss(z, LABELS)),
            (ending(nn.Softmax(1)), by_hand),
            (ending(nn.Softmax(1)), lambda p: F.nll_loss(p.log(), LABELS)),
            (ending(nn.Sigmoid(), ONE), lambda p: F.binary_cross_entropy(p, Y[:, None])),
            # A soft cap, and a temperature.
            (SCORES, lambda z: cross_entropy(30 * torch.tanh(z / 30))),
            (ending(nn.Softmax(1)), lambda p: cross_entropy(p / 0.05)),
            (
                SCORES,
                lambda z: F.nll_loss(z.view(4, 4, 5).log_softmax(2).view(-1, 5), LABELS.repeat(2)),
            ),
            # Contrastive: the similarities are the scores.
            (ending(nn.Tanh()), lambda z: cross_entropy(z @ z.T)),
            # A softmax by hand, and one that weighs the samples.
            (SCORES, lambda z: by_hand(z.exp() / z.exp().sum(1, keepdim=True))),
            (SCORES, lambda z: F.mse_loss((z * z.softmax(0)).sum(0), torch.zeros(10))),
            (SCORES, lambda z: (1 + z.square()).log().mean()),
            (ending(nn.Softplus()), lambda z: -(z + 1e-6).log().mean()),
        ],
    )
    @pytest.mark.parametrize("fall", [LEARNING, STUCK])
    def test_heads_that_fit(self, model: nn.Module, loss: Loss, fall: tuple[float, float]) -> None:
        builder = signalled(headed(model, loss, loss=fall), "input", (8, 5))
        assert found(output_activation_mismatch, builder.build()) is None

    def test_a_softmax_in_the_model_is_not_its_end(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.keys, self.head = nn.Linear(5, 1), nn.Linear(5, 10)

            def forward(self, given: Tensor) -> Tensor:
                # Over a single key the weights are 1.
                weights = self.keys(given).softmax(1)
                return self.head(weights * given)  # type: ignore[no-any-return]

        run = headed(Attention(), cross_entropy, loss=STUCK).build()
        assert found(output_activation_mismatch, run) is None


class TestLossShape:
    def broadcast(self, of: Loss, fall: tuple[float, float] = LEARNING) -> Builder:
        with warnings.catch_warnings():
            # PyTorch says so, too.
            warnings.simplefilter("ignore", UserWarning)
            return headed(ONE, of, loss=fall)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z: F.mse_loss(z, Y),
            lambda z: F.mse_loss(z, Y, reduction="sum") / 8,
            lambda z: F.l1_loss(z, Y),
            lambda z: F.smooth_l1_loss(z, Y),
            lambda z: F.huber_loss(z, Y),
            lambda z: F.mse_loss(z.squeeze(), Y[:, None]),
            lambda z: ((z - Y) ** 2).mean(),
            lambda z: ((z - Y) * (z - Y)).mean(),
            lambda z: (Y - z).abs().mean(),
            lambda z: (F.softplus(z) - z * Y).mean(),
            lambda z: -(Y * z.sigmoid().log() + (1 - Y) * (1 - z.sigmoid()).log()).mean(),
            lambda z: ((z.view(-1) - Y[:, None]) ** 2).mean().sqrt(),
            lambda z: 0.5 * ((z[:, 0] - Y[:, None]) ** 2).sum() / 8,
        ],
    )
    def test_every_output_against_every_target(self, loss: Loss) -> None:
        finding = found(loss_shape_mismatch, self.broadcast(loss).build())
        assert finding is not None
        assert finding.severity is Severity.ERROR
        assert "makes [8, 8]" in finding.message
        assert finding.evidence[0].observed == 8

    def test_maps_that_lost_their_channel(self) -> None:
        maps = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (1, 2, 3)))
        run = headed(maps, lambda z: (z - torch.ones(8, 2, 3)).abs().mean())
        # The channel comes of a view in the model, not in the loss.
        finding = found(loss_shape_mismatch, run.build())
        assert finding is not None
        assert "makes [8, 8, 2, 3]" in finding.message

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z: F.mse_loss(z, Y[:, None]),
            lambda z: F.mse_loss(z.squeeze(1), Y),
            lambda z: ((z - 0.5) ** 2).mean(),
            lambda z: ((z - torch.tensor(0.5)) ** 2 * Y[:, None]).mean(),
            # Per-feature weights, anchors that are not the batch, quantiles.
            lambda z: ((z - torch.ones(1)) ** 2 * torch.ones(8, 3)).mean(),
            lambda z: ((z - torch.ones(5)) ** 2).mean(),
            lambda z: F.smooth_l1_loss(z[:, :, None].expand(8, 1, 4), torch.ones(8, 1, 4)),
            # All pairs are meant.
            lambda z: ((z[:, None] - Y[None, :, None]) ** 2).mean(),
            lambda z: (z[:, None] - Y).abs().mean(),
            lambda z: ((z - z.T) ** 2).mean(),
            lambda z: (z - Y).abs().mean() - 0.5 * (z - z.T).abs().mean(),
            lambda z: (-((z - Y) ** 2)).exp().mean(),
            lambda z: ((z - Y) ** 2).min(1).values.mean(),
            lambda z: torch.cdist(z, Y[:, None]).mean(),
            lambda z: (z @ Y[None, :]).pow(2).mean(),
            # A product of what is not the output, and one summed over one of the axes.
            lambda z: (z.square().sum(1) * Y[:, None]).mean(),
            lambda z: (z * Y).sum(1).exp().mean(),
        ],
    )
    def test_shapes_that_are_meant(self, loss: Loss) -> None:
        assert found(loss_shape_mismatch, self.broadcast(loss, STUCK).build()) is None

    @pytest.mark.parametrize(
        ("shape", "expected"), [((8,), True), ((8, 1), False), ((8, 8), False)]
    )
    def test_the_target_that_was_seen_decides(self, shape: tuple[int, ...], expected: bool) -> None:
        builder = self.broadcast(lambda z: F.mse_loss(z, Y))
        signalled(builder, "target", shape)
        assert (found(loss_shape_mismatch, builder.build()) is not None) is expected

    def test_a_batch_of_two_may_be_a_coincidence(self) -> None:
        for batch, expected in ((3, False), (4, True)):
            builder = headed(ONE, lambda z: ((z - Y[: len(z)]) ** 2).mean(), batch=batch)
            assert (found(loss_shape_mismatch, builder.build()) is not None) is expected


class TestInitialLoss:
    def run(self, loss: tuple[float, float], of: Loss = cross_entropy, **meta: Any) -> Run:
        builder = headed(SCORES, of, loss=loss, **meta)
        builder.scalars["loss"][0] = loss[0]
        return builder.build()

    @pytest.mark.parametrize(("start", "expected"), [(2.9, False), (3.1, True)])
    def test_the_limit_is_a_threefold_guess(self, start: float, expected: bool) -> None:
        run = self.run((start * math.log(10), 1.0))
        finding = found(initial_loss_off, run)
        assert (finding is not None) is expected
        if finding is not None:
            assert finding.severity is Severity.INFO
            assert finding.evidence[0].observed == pytest.approx(start, rel=1e-5)

    @pytest.mark.parametrize(
        "of",
        [
            lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
            lambda z: F.cross_entropy(z, LABELS, reduction="none").sum(),
        ],
    )
    @pytest.mark.parametrize(("end", "severity"), [(18.4, "error"), (40.0, "error"), (2.0, "info")])
    def test_a_sum_is_named(self, of: Loss, end: float, severity: str) -> None:
        # Equal scores cost 8·ln 10 = 18.4.
        finding = found(initial_loss_off, self.run((18.42, end), of))
        assert finding is not None
        assert finding.severity.value == severity
        assert "adds up 8 terms" in finding.message
        assert "reduction='mean'" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("end", "severity"), [(40.0, "warning"), (0.0, "info"), (-3.0, "info")]
    )
    def test_confident_and_wrong(self, end: float, severity: str) -> None:
        finding = found(initial_loss_off, self.run((40.0, end)))
        assert finding is not None
        assert finding.severity.value == severity
        assert "confident and wrong" in finding.message

    @pytest.mark.parametrize("fall", [(2.3, 0.1), (0.4, 0.1), STUCK])
    def test_a_loss_that_starts_as_a_guess_or_below(self, fall: tuple[float, float]) -> None:
        assert found(initial_loss_off, self.run(fall)) is None

    def test_it_needs_the_first_loss(self) -> None:
        builder = headed(SCORES, cross_entropy, loss=(40, 40))
        builder.steps = builder.steps + 10
        (skip,) = analyze(builder.build(), rules=[initial_loss_off]).skipped
        assert "first step" in skip.reason

    def test_where_loss_is_no_progress_it_is_information(self) -> None:
        finding = found(initial_loss_off, self.run((40.0, 40.0), loss_is_progress=False))
        assert finding is not None
        assert finding.severity is Severity.INFO
