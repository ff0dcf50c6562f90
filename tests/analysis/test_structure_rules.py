"""GS304, GS305, GS308 and GS309: what the graph and the modules say before any number does."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.analysis.rules.batchnorm_statistics_stale import batchnorm_statistics_stale
from gradscope.analysis.rules.dropout_dominates import dropout_dominates
from gradscope.analysis.rules.hidden_softmax import hidden_softmax
from gradscope.analysis.rules.linear_network import linear_network
from gradscope.record import Run
from tests.analysis.additions import add, graph_of
from tests.analysis.synthetic import Builder, Chain
from tests.analysis.test_depth_rules import STUCK

LEARNING = (2.3, 1.0)
STEPS = np.arange(100)


def found(run: Run, rule: Rule[Any]) -> list[Finding]:
    report = analyze(run, rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    return list(report.findings)


def modelled(model: nn.Module, x: Tensor, fall: tuple[float, float] = STUCK) -> Builder:
    """A run of 100 steps with this model's graph, and the modules that it has."""
    output = model(x)
    graph = graph_of(output.square().mean(), output, model)
    empty = Builder(STEPS, [], [], {"graph": graph})
    for depth, (name, module) in enumerate(model.named_modules()):
        kind = "linear" if isinstance(module, nn.Linear) else "other"
        kind = "convolution" if isinstance(module, nn.Conv2d) else kind
        kind = "activation" if isinstance(module, (nn.ReLU, nn.Softmax, nn.Sigmoid)) else kind
        if name and not list(module.children()):
            add(empty, "modules", name, group=kind, of=type(module).__name__, depth=depth)
    noise = np.random.default_rng(0).normal(0, 0.01, 100)
    empty.scalars["loss"] = np.linspace(*fall, 100) + noise
    empty.meta["dropout"] = {
        name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)
    }
    return empty


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


class LowRank(nn.Module):
    """A weight that is the product of two, as LoRA merges it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a @ self.b)


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x, self.weight)
        return result


FLAT = (4, 6)
LINEAR = {
    "two layers": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), FLAT),
    "over time": (nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3)), (2, 4, 6)),
    "sigmoid at the end": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1), nn.Sigmoid()), FLAT),
    "dropout": (nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)), FLAT),
    "residual": (nn.Sequential(nn.Linear(6, 6), Residual(nn.Linear(6, 6)), nn.Linear(6, 1)), FLAT),
    "a scale": (
        nn.Sequential(nn.Linear(6, 6), Called(lambda x, w: x * w), nn.Linear(6, 1)),
        FLAT,
    ),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.AvgPool2d(2),
            nn.Conv2d(2, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 2),
        ),
        (2, 1, 8, 8),
    ),
}
BENT = {
    "one layer": (nn.Linear(6, 3), FLAT),
    "relu": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), FLAT),
    # Somewhere is enough: a bottleneck follows a layer directly.
    "relu once": (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(2, 3)),
        FLAT,
    ),
    "layer norm": (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), FLAT),
    "a low rank weight": (LowRank(), FLAT),
    "a relu by hand": (
        nn.Sequential(nn.Linear(6, 6), Called(lambda x, _: x * (x > 0)), nn.Linear(6, 1)),
        FLAT,
    ),
    "a gate": (
        nn.Sequential(nn.Linear(6, 6), Called(lambda x, w: x * (x * w)), nn.Linear(6, 1)),
        FLAT,
    ),
    "max pooling": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1)),
        (2, 1, 8, 8),
    ),
    "a gated output": (
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Called(lambda x, _: x * x.flip(0))),
        FLAT,
    ),
    "attention": (
        nn.TransformerEncoderLayer(
            6, 2, 8, batch_first=True, activation=lambda x: x, norm_first=True
        ),
        (2, 4, 6),
    ),
}


class TestLinearNetwork:
    @pytest.mark.parametrize("case", LINEAR)
    def test_layers_with_nothing_non_linear_between_them(self, case: str) -> None:
        model, shape = LINEAR[case]
        torch.manual_seed(0)
        (finding,) = found(modelled(model, torch.randn(shape)).build(), linear_network)
        assert finding.severity is Severity.ERROR
        layers = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
        assert finding.evidence[0].observed == layers
        assert f"{layers} layers" in finding.message
        assert finding.layer == "0"

    @pytest.mark.parametrize("case", BENT)
    def test_any_non_linearity_is_enough(self, case: str) -> None:
        model, shape = BENT[case]
        assert found(modelled(model, torch.randn(shape)).build(), linear_network) == []

    def test_one_that_learns_is_information(self) -> None:
        model, shape = LINEAR["two layers"]
        run = modelled(model, torch.randn(shape), LEARNING).build()
        (finding,) = found(run, linear_network)
        assert finding.severity is Severity.INFO

    def test_a_head_of_two_layers_on_a_frozen_network_is_no_linear_network(self) -> None:
        features = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).requires_grad_(requires_grad=False)
        model = nn.Sequential(features, nn.Linear(5, 4), nn.Linear(4, 3))
        assert found(modelled(model, torch.randn(FLAT)).build(), linear_network) == []

    def test_says_where_an_activation_belongs(self) -> None:
        model, shape = LINEAR["two layers"]
        (finding,) = found(modelled(model, torch.randn(shape)).build(), linear_network)
        assert "behind layer 0" in finding.remedies[0]

    @pytest.mark.parametrize("lack", ["no graph", "truncated"])
    def test_without_the_whole_graph_nothing_is_said(self, lack: str) -> None:
        model, shape = LINEAR["two layers"]
        builder = modelled(model, torch.randn(shape))
        if lack == "truncated":
            builder.meta["graph"]["truncated"] = True
        else:
            del builder.meta["graph"]
        for rule in (linear_network, hidden_softmax):
            report = analyze(builder.build(), rules=[rule])
            assert report.findings == ()
            assert "graph" in report.skipped[0].reason
            assert "failed" not in report.skipped[0].reason


class Memory(nn.Module):
    """Attention over learned values: a softmax times a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.keys, -1) @ self.values


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList([nn.Linear(6, 3) for _ in "ab"])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.stack([e(x) * weights[:, i : i + 1] for i, e in enumerate(self.experts)]).sum(
            0
        )


def hidden(dim: int = -1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Softmax(dim), nn.Dropout(0.1), nn.Linear(5, 3))


class TestHiddenSoftmax:
    @pytest.mark.parametrize(
        ("fall", "severity"), [(STUCK, Severity.ERROR), (LEARNING, Severity.INFO)]
    )
    def test_a_softmax_between_layers(self, fall: tuple[float, float], severity: Severity) -> None:
        builder = modelled(hidden(), torch.randn(4, 6), fall)
        column = builder.at("modules", "1")
        entity = builder.entities["modules"][column]
        object.__setattr__(entity, "shape", (4, 5))
        (finding,) = found(builder.build(), hidden_softmax)
        assert finding.severity is severity
        assert finding.layer == "1"
        assert "over 5 units" in finding.message
        assert "layer 1 by nn.ReLU()" in finding.remedies[0]

    @pytest.mark.parametrize(("dim", "units"), [(-1, 5), (0, 4)])
    def test_names_how_many_units_compete(self, dim: int, units: int) -> None:
        (finding,) = found(modelled(hidden(dim), torch.randn(4, 6)).build(), hidden_softmax)
        assert f"A softmax over {units} units feeds" in finding.message

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(-1)),
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
            nn.Sequential(nn.Linear(6, 6), Memory(), nn.Linear(6, 2)),
            Experts(),
        ],
        ids=["at the end", "attention", "learned values", "a gate"],
    )
    def test_where_a_softmax_belongs_it_is_no_finding(self, model: nn.Module) -> None:
        x = (
            torch.randn(2, 4, 6)
            if isinstance(model, nn.TransformerEncoderLayer)
            else torch.randn(4, 6)
        )
        assert found(modelled(model, x).build(), hidden_softmax) == []


class TestDropoutDominates:
    def run(self, p: float, fall: tuple[float, float] = STUCK, mode: float = 1.0) -> Run:
        builder = Chain(layers=4, loss=fall, meta={"dropout": {"drop": p, "other": 0.1}}).builder()
        add(builder, "modules", "drop", group="dropout", of="Dropout", depth=3, training=mode)
        return builder.build()

    @pytest.mark.parametrize(
        ("p", "fall", "expected"),
        [
            (0.89, STUCK, None),
            (0.9, STUCK, Severity.WARNING),
            (1.0, STUCK, Severity.ERROR),
            (0.95, LEARNING, Severity.INFO),
        ],
    )
    def test_the_limit_and_the_harm(
        self, p: float, fall: tuple[float, float], expected: Severity | None
    ) -> None:
        findings = found(self.run(p, fall), dropout_dominates)
        assert [finding.severity for finding in findings] == ([expected] if expected else [])

    def test_names_the_layer_and_what_was_meant(self) -> None:
        (finding,) = found(self.run(0.95), dropout_dominates)
        assert finding.layer == "drop"
        assert "keeps 5% of what comes in" in finding.message
        assert "0.05" in finding.remedies[0]

    @pytest.mark.parametrize(("mode", "amount"), [(0.0, 0), (math.nan, 1)])
    def test_in_evaluation_mode_nothing_is_dropped(self, mode: float, amount: int) -> None:
        assert len(found(self.run(0.95, mode=mode), dropout_dominates)) == amount


def normed(norms: object, mode: object = 1.0) -> Builder:
    builder = Chain(layers=4).builder()
    return add(
        builder,
        "modules",
        "norm",
        group="norm",
        of="BatchNorm1d",
        depth=3,
        buffer_norm=norms,
        training=mode,
    )


class TestBatchNormStatistics:
    def test_that_never_move(self) -> None:
        (finding,) = found(normed(8.0).build(), batchnorm_statistics_stale)
        assert finding.severity is Severity.WARNING
        assert finding.layer == "norm"
        assert "did not move in 100 recorded steps" in finding.message
        assert "momentum=0.1" in finding.remedies[0]

    @pytest.mark.parametrize(
        ("norms", "mode"),
        [
            # They converge, and then stay: a batch that is always the same.
            (np.minimum(STEPS, 20) + 8.0, 1.0),
            (np.where(STEPS % 2, np.nextafter(np.float32(8), np.float32(9)), np.float32(8)), 1.0),
            # As they should in evaluation mode.
            (8.0, 0.0),
            (8.0, np.where(STEPS < 4, 1.0, 0.0)),
            (8.0, math.nan),
        ],
        ids=["converged", "by a bit", "evaluation", "four steps", "unknown"],
    )
    def test_that_move_or_are_not_meant_to(self, norms: object, mode: object) -> None:
        assert found(normed(norms, mode).build(), batchnorm_statistics_stale) == []

    @pytest.mark.parametrize(("momentum", "amount"), [(1e-6, 1), (1e-4, 0)])
    def test_that_move_by_next_to_nothing(self, momentum: float, amount: int) -> None:
        # Ten channels, whose true variance is 4: running averages of it, from 1 on.
        variance = 4 - 3 * (1 - momentum) ** STEPS
        builder = normed(np.sqrt(10) * variance)
        builder.entities["modules"][-1] = replace(builder.entities["modules"][-1], shape=(32, 10))
        findings = found(builder.build(), batchnorm_statistics_stale)
        assert len(findings) == amount
        assert all("hardly moved in 100 recorded steps" in f.message for f in findings)

    def test_steps_in_evaluation_mode_in_between_do_not_count(self) -> None:
        mode = np.where(STEPS % 2, 1.0, 0.0)
        (finding,) = found(
            normed(np.where(mode == 1, 8.0, STEPS), mode).build(), batchnorm_statistics_stale
        )
        assert "50 recorded steps" in finding.message
