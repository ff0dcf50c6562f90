"""The view of the recorded graph, on graphs of real losses and on broken ones."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.chance import chance
from gradscope.analysis.graph import loss_graph
from gradscope.analysis.rule import UnjudgedError
from gradscope.analysis.rules.constant_target import constant_target
from gradscope.analysis.rules.initial_loss_off import initial_loss_off
from gradscope.analysis.rules.invalid_input import invalid_input
from gradscope.analysis.rules.loss_shape_mismatch import loss_shape_mismatch
from gradscope.analysis.rules.output_activation_mismatch import output_activation_mismatch
from gradscope.analysis.rules.unscaled_input import unscaled_input
from gradscope.analysis.rules.unscaled_target import unscaled_target
from tests.analysis.heads import LABELS, headed, signalled
from tests.analysis.synthetic import Chain

RULES = (
    unscaled_input,
    unscaled_target,
    initial_loss_off,
    output_activation_mismatch,
    loss_shape_mismatch,
    constant_target,
    invalid_input,
)
LAST = nn.Linear(7, 10)
NET = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), LAST)


def test_the_head_ends_at_the_last_layer() -> None:
    run = headed(NET, lambda scores: F.cross_entropy(scores, LABELS)).build()
    graph = loss_graph(run)
    assert [graph.nodes[at].op for at in graph.head] == ["NllLoss", "LogSoftmax", "Addmm"]
    assert graph.output == graph.head[-1]
    assert graph.nodes[graph.head[1]].dim == 1
    assert graph.nodes[graph.head[1]].shape == (8, 10)


def test_a_dim_counted_from_the_end_is_the_same() -> None:
    run = headed(NET, lambda scores: F.nll_loss(scores.log_softmax(-1), LABELS)).build()
    graph = loss_graph(run)
    assert graph.nodes[next(graph.find("LogSoftmax"))].dim == 1


def test_what_made_the_entries_is_found_through_views() -> None:
    run = headed(
        NET,
        lambda scores: F.cross_entropy(scores.view(2, 4, 10).transpose(1, 2), LABELS.view(2, 4)),
    ).build()
    graph = loss_graph(run)
    maker = graph.maker(graph.nodes[0].inputs[0])
    assert graph.nodes[maker].op == "LogSoftmax"
    assert graph.nodes[graph.maker(graph.nodes[maker].inputs[0])].op == "Addmm"


@pytest.mark.parametrize(
    ("terms", "classes", "loss"),
    [
        (8, 10, lambda z: F.cross_entropy(z, LABELS)),
        (8, 10, lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1) / 4),
        (16, 5, lambda z: F.cross_entropy(z.view(-1, 5), LABELS.repeat(2) % 5)),
        (16, 5, lambda z: F.cross_entropy(z.view(8, 5, 2), LABELS.view(8, 1).repeat(1, 2) % 5)),
        (80, 2, lambda z: F.binary_cross_entropy_with_logits(z, torch.ones(8, 10))),
    ],
)
def test_a_guess_costs_what_equal_probabilities_cost(terms: int, classes: int, loss: Any) -> None:
    guess = chance(headed(NET, loss).build())
    assert (guess.terms, guess.classes) == (terms, classes)
    # Of equal scores, computed by torch.
    equal = F.cross_entropy(torch.zeros(1, classes), torch.zeros(1, dtype=torch.int64))
    assert guess.loss == pytest.approx(equal.item())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, LABELS) + z.pow(2).sum(),
        lambda z: F.cross_entropy(z, LABELS) + F.cross_entropy(z[:, :2], LABELS % 2),
        lambda z: F.cross_entropy(z, LABELS) + LAST.weight.pow(2).sum(),
        lambda z: F.mse_loss(z, torch.zeros(8, 10)),
    ],
)
def test_what_guessing_costs_in_other_losses_is_not_known(loss: Any) -> None:
    with pytest.raises(UnjudgedError):
        chance(headed(NET, loss).build())


odd = st.recursive(
    st.none() | st.integers(-3, 2**64) | st.text(max_size=3) | st.sampled_from([1.5, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
node = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(
            [
                "NllLossBackward0",
                "LogSoftmaxBackward0",
                "SoftmaxBackward0",
                "MseLossBackward0",
                "BinaryCrossEntropyBackward0",
                "SubBackward0",
                "ExpandBackward0",
                "ViewBackward0",
                "LogBackward0",
                "AddBackward0",
                "AddmmBackward0",
            ]
        )
        | odd,
        "inputs": st.lists(st.integers(-2, 6), max_size=3) | odd,
        "shapes": st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=2) | odd,
        "saved": st.dictionaries(st.sampled_from(["dim", "reduction"]), odd) | odd,
    },
)


@given(st.lists(node | odd, max_size=6) | odd, odd | st.integers(0, 5))
def test_a_graph_however_odd_is_no_traceback(nodes: object, output: object) -> None:
    graph = {"root": "loss", "nodes": nodes, "output": output}
    builder = Chain(layers=2, loss=(2.3, 2.3), meta={"graph": graph}).builder()
    for name in ("input", "output", "target"):
        signalled(builder, name, (8, 1), rms=1e3, min=-1, max=9, mean=3, std=1, distinct=1)
    report = analyze(builder.build(), rules=RULES)
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]


@pytest.mark.parametrize("given_graph", [None, [], {"root": "output", "nodes": [{}]}, {}])
def test_without_the_graph_of_a_loss_its_rules_say_so(given_graph: object) -> None:
    run = Chain(layers=2, meta={"graph": given_graph}).run()
    report = analyze(run, rules=RULES)
    assert report.findings == ()
    assert {skip.code for skip in report.skipped} == {asked.code for asked in RULES}
    reasons = {skip.reason for skip in report.skipped if skip.code == "GS604"}
    assert all("graph" in reason for reason in reasons)


@pytest.mark.parametrize("steps", [1, 3])
def test_runs_of_few_steps_and_tables_of_nan(steps: int) -> None:
    builder = headed(NET, lambda z: F.cross_entropy(z, LABELS), steps=steps)
    for name in ("input", "output", "target"):
        signalled(builder, name, (8, 5))
    for table in builder.arrays.values():
        for values in table.values():
            values[:] = float("nan")
    report = analyze(builder.build(), rules=RULES)
    assert report.findings == ()
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
