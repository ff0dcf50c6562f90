"""Module outputs and the gradients arriving there, against autograd by hand in float64."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from gradscope.record import Run, Table
from tests.capture import trainings
from tests.capture.reference import Numbers, described, prefixed
from tests.capture.subjects import SUBJECTS, Seen, Subject, Tape

NOT_RECORDED = {"output_grad_mean", "output_grad_std", "output_norm"}
# Have tests of their own.
ELSEWHERE = {
    "output_saturated_fraction",
    "dead_unit_fraction",
    "attention_logit_max",
    "attention_entropy",
    "training",
    "buffer_norm",
    "output_sample_similarity",
}


def numbers_of(seen: Seen) -> dict[str, Numbers]:
    """The quantities of each module use; micro-batches count as one concatenated sample."""
    found: dict[str, Numbers] = {}
    for name, uses in seen.items():
        numbers = prefixed("output_", described([output for output, _ in uses]))
        gradients = [gradient for _, gradient in uses if gradient is not None]
        if gradients:
            numbers |= prefixed("output_grad_", described(gradients))
        found[name] = {q: v for q, v in numbers.items() if q not in NOT_RECORDED}
    return found


def assert_modules(table: Table, expected: Mapping[str, Numbers], row: int = 0) -> None:
    for name, numbers in expected.items():
        assert name in table.names
        column = table.names.index(name)
        # What is along time has tests of its own: tests/setups/test_recurrent.py.
        along_time = table.entities[column].group == "recurrent"
        for quantity in set(table.quantities) - ELSEWHERE:
            if along_time and quantity.startswith("time_"):
                continue
            found = float(table[quantity][row, column])
            wanted = numbers.get(quantity, float("nan"))
            slack = 1e-6 * numbers.get("output_rms", 0)
            where = f"{name}, {quantity}: {found} instead of {wanted}"
            if np.isnan(wanted):
                assert np.isnan(found), where
            else:
                assert abs(found - wanted) <= 1e-4 * abs(wanted) + slack, where


def merged(*micro_batches: Seen) -> Seen:
    names = dict.fromkeys(name for seen in micro_batches for name in seen)
    return {name: [use for seen in micro_batches for use in seen[name]] for name in names}


def one_step(
    model: nn.Module, loss_of: Callable[[], Sequence[Tensor]], log_dir: Path, **options: object
) -> Run:
    """The run of one recorded step over all the losses."""
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=log_dir, every=1, **options) as scope:  # type: ignore[arg-type]
        for loss in loss_of():
            loss.backward()
        optimizer.step()
        return scope.run()


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    return SUBJECTS[request.param]()


def expected_of(subject: Subject, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Numbers]:
    every = []
    # BatchNorm's running statistics must not be counted twice.
    buffers = {name: value.clone() for name, value in subject.model.named_buffers()}
    for x, y in batches:
        tape = Tape()
        loss = F.cross_entropy(subject.by_hand(tape, x), y) / len(batches)
        every.append(tape.seen(loss))
    subject.model.load_state_dict(buffers, strict=False)
    return numbers_of(merged(*every))


def test_outputs_and_their_gradients(subject: Subject, tmp_path: Path) -> None:
    expected = expected_of(subject, [(subject.x, subject.y)])
    run = one_step(
        subject.model, lambda: [F.cross_entropy(subject.model(subject.x), subject.y)], tmp_path
    )
    assert_modules(run.modules, expected)
    assert set(run.modules.names) == set(expected)
    assert run.meta["problems"] == []


def test_micro_batches_are_one_concatenated_sample(subject: Subject, tmp_path: Path) -> None:
    batches = [(subject.x, subject.y), (subject.x[:3] * 2, subject.y[:3])]
    expected = expected_of(subject, batches)
    losses = (F.cross_entropy(subject.model(x), y) / 2 for x, y in batches)
    run = one_step(subject.model, lambda: losses, tmp_path)  # type: ignore[arg-type, return-value]
    assert_modules(run.modules, expected)


def test_backward_after_all_forwards_is_the_same(subject: Subject, tmp_path: Path) -> None:
    batches = [(subject.x, subject.y), (subject.x[:3] * 2, subject.y[:3])]
    expected = expected_of(subject, batches)

    def losses() -> list[Tensor]:
        total = [F.cross_entropy(subject.model(x), y) / 2 for x, y in batches]
        return [torch.stack(total).sum()]

    assert_modules(one_step(subject.model, losses, tmp_path).modules, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_between_is_not_seen(
    mode: Callable[[], torch.no_grad], subject: Subject, tmp_path: Path
) -> None:
    """Before the forward, between forward and backward, and before and after the step."""
    expected = expected_of(subject, [(subject.x, subject.y)])
    model = subject.model
    optimizer = SGD(model.parameters(), lr=0.1)

    def evaluate() -> None:
        model.eval()
        with mode():
            model(subject.x * 100)
        model.train()

    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        evaluate()
        loss = F.cross_entropy(model(subject.x), subject.y)
        evaluate()
        loss.backward()
        evaluate()
        optimizer.step()
        evaluate()
        run = scope.run()
    assert list(run.steps) == [0]
    assert_modules(run.modules, expected)
    assert set(run.modules.names) == set(expected)
    assert run.signals["absmax"][0, 0] == pytest.approx(float(subject.x.abs().max()))
    assert run.meta["coverage"]["forwards"] == 1


class Blocks(nn.Module):
    """Two blocks, which may be checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (
                block(x)
                if self.reentrant is None
                else checkpoint(block, x, use_reentrant=self.reentrant)
            )
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "plain", "reentrant"])
def test_checkpointed_modules_count_once(reentrant: bool | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks(reentrant)
    x, y = trainings.vectors()
    tape = Tape()
    hidden = tape("stem", model.stem(x))
    for index, block in enumerate(model.blocks):
        assert isinstance(block, nn.Sequential)
        hidden = tape(f"blocks.{index}.0", block[0](hidden))
        hidden = tape(f"blocks.{index}", tape(f"blocks.{index}.1", torch.tanh(hidden)))
    out = tape("(root)", tape("head", model.head(hidden)))
    expected = numbers_of(tape.seen(F.cross_entropy(out, y)))
    run = one_step(model, lambda: [F.cross_entropy(model(x), y)], tmp_path)
    assert_modules(run.modules, expected)
    assert set(run.modules.names) == set(expected)


def test_depth_is_the_order_of_execution(tmp_path: Path) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 5)
            self.middle = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
            self.first = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.middle(self.first(x)))
            return out

    model = Backwards()
    x, y = trainings.vectors()
    table = one_step(model, lambda: [F.cross_entropy(model(x), y)], tmp_path).modules
    by_depth = [entity.name for entity in sorted(table.entities, key=lambda e: e.depth)]
    assert by_depth == ["(root)", "first", "middle.0", "middle.1", "last"]


def test_half_precision_outputs_under_autocast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU())
    x = torch.randn(32, 6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](x)
    expected = prefixed("output_", described([hidden]))

    def loss() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [model(x).float().square().mean()]

    table = one_step(model, loss, tmp_path).modules
    at = table.names.index("0")
    for quantity in ("output_rms", "output_mean", "output_std", "output_absmax"):
        assert table[quantity][0, at] == pytest.approx(expected[quantity], rel=1e-4)


def test_nonfinite_outputs_and_gradients_are_counted_and_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity())
    x = torch.ones(2, 3)
    x[1] = torch.inf
    weights = torch.ones(2, 4)
    weights[0, 0], weights[0, 1] = torch.nan, torch.inf
    output = model[0](x).detach()
    table = one_step(model, lambda: [(model(x) * weights).sum()], tmp_path).modules
    expected = numbers_of({"0": [(output, weights)]})
    assert expected["0"]["output_nonfinite"] == 4
    assert expected["0"]["output_grad_nonfinite"] == 2
    assert_modules(table, expected)
