"""A module that is called again and again in a forward: its first, middle and last use."""

import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.reference import described, prefixed
from tests.setups.support import support

BATCH, FEATURES, UNITS = 3, 2, 4
CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
    "tanh": lambda: nn.RNNCell(FEATURES, UNITS),
    "relu": lambda: nn.RNNCell(FEATURES, UNITS, nonlinearity="relu"),
    "lstm": lambda: nn.LSTMCell(FEATURES, UNITS),
    "gru": lambda: nn.GRUCell(FEATURES, UNITS),
}
COMPARED: tuple[str, ...] = (
    "output_rms",
    "output_mean",
    "output_std",
    "output_absmax",
    "output_grad_norm",
)
COMPARED += ("output_grad_rms", "output_grad_absmax", "output_grad_zero_fraction")


class Loop(nn.Module):
    """Calls its cell at every time step and reads the last output, or all."""

    def __init__(self, cell: nn.RNNCellBase, *, reads_all: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.reads_all = reads_all
        # What was called, to be looked at from outside.
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        read = torch.stack(outputs) if self.reads_all else outputs[-1]
        return read.square().sum()


def make(kind: str, *, reads_all: bool = False) -> Loop:
    torch.manual_seed(0)
    return Loop(CELLS[kind](), reads_all=reads_all)


def inputs(steps: int, seed: int = 1) -> Tensor:
    return torch.randn(steps, BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Loop, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every output of the cell and the gradient arriving there, by the equations in float64."""
    w_ih, w_hh, b_ih, b_hh = (p.detach().double() for p in model.cell.parameters())
    h = c = torch.zeros(x.shape[1], UNITS, dtype=torch.float64)
    outputs = []
    for step in x.double():
        a, b = step @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if isinstance(model.cell, nn.LSTMCell):
            i, f, g, o = (a + b).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif isinstance(model.cell, nn.GRUCell):
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3, 1)
            z = (a_z + b_z).sigmoid()
            h = (1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * h
        else:
            h = (a + b).tanh() if model.cell.nonlinearity == "tanh" else (a + b).relu()
        # A node of its own for each step, so that each has its own gradient.
        h = h.requires_grad_() if not h.requires_grad else h
        outputs.append(h)
    read = torch.stack(outputs) if model.reads_all else outputs[-1]
    gradients = torch.autograd.grad(read.square().sum(), outputs)
    return outputs, list(gradients)


Uses = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


def roles(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Uses:
    """Which use is recorded under which name."""
    uses = list(zip(outputs, gradients, strict=True))
    named = {f"cell#{at}" if at else "cell": [use] for at, use in enumerate(uses[:16])}
    return {**named, "cell#middle": [uses[len(uses) // 2]], "cell#last": [uses[-1]]}


def assert_uses(run: Run, expected: Uses, row: int = 0) -> None:
    known = {
        name
        for name, entity in zip(run.modules.names, run.modules.entities, strict=True)
        if entity.kind == "module"
        and np.isfinite(run.modules["output_rms"][row, run.modules.names.index(entity.name)])
    }
    assert known - {"(root)"} == set(expected)
    for name, uses in expected.items():
        numbers = prefixed("output_", described([output for output, _ in uses]))
        numbers |= prefixed("output_grad_", described([gradient for _, gradient in uses]))
        column = run.modules.names.index(name)
        for quantity in COMPARED:
            found = float(run.modules[quantity][row, column])
            assert found == pytest.approx(numbers[quantity], rel=1e-4, abs=1e-7), (name, quantity)


def assert_time(run: Run, expected: Uses, steps: float, row: int = 0) -> None:
    column = run.modules.names.index("cell")
    for end, name in (("first", "cell"), ("middle", "cell#middle"), ("last", "cell#last")):
        norm = float(np.sqrt(sum(float(g.square().sum()) for _, g in expected[name])))
        found = float(run.modules[f"time_grad_{end}"][row, column])
        assert found == pytest.approx(norm, rel=1e-4), end
    assert run.modules["time_steps"][row, column] == steps


def recorded(model: nn.Module, *batches: Tensor, every: int = 1) -> Run:
    """One step for each batch; nothing is learned, so that each is what it is by hand."""
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, every=every) as scope:
        for x in batches:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        return scope.run()


@support(
    "Recurrent nets",
    "a cell at every time step: first, middle and last use",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("reads_all", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("steps", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("kind", CELLS)
def test_first_middle_and_last_use(kind: str, steps: int, reads_all: bool) -> None:
    model, x = make(kind, reads_all=reads_all), inputs(steps)
    expected = roles(*by_hand(model, x))
    run = recorded(model, x)
    assert_uses(run, expected)
    assert_time(run, expected, steps)


def test_names_stay_where_the_length_varies() -> None:
    model = make("lstm")
    batches = [inputs(steps, seed=steps) for steps in (20, 7, 33, 1)]
    run = recorded(model, *batches)
    for row, x in enumerate(batches):
        expected = roles(*by_hand(model, x))
        assert_uses(run, expected, row)
        assert_time(run, expected, len(x), row)
    names = run.modules.names
    assert len(names) == len(set(names)) == 16 + 2


def test_the_middle_and_the_last_are_as_deep_as_the_first() -> None:
    run = recorded(make("gru"), inputs(20))
    by_name = {entity.name: entity for entity in run.modules.entities}
    for name in ("cell#middle", "cell#last"):
        assert by_name[name].depth == by_name["cell"].depth
        assert by_name[name].shape == (BATCH, UNITS)
        assert (by_name[name].type, by_name[name].group) == ("GRUCell", "recurrent")


def test_micro_batches_count_as_one_sample() -> None:
    model = make("tanh")
    batches = [inputs(20), inputs(9, seed=2), inputs(30, seed=3)]
    parts = [roles(*by_hand(model, x)) for x in batches]
    expected = {
        name: [use for part in parts for use in part.get(name, ())]
        for name in dict.fromkeys(name for part in parts for name in part)
    }
    optimizer = SGD(model.parameters(), lr=0.0)
    for after_all in (False, True):
        with watch(model, optimizer, every=1) as scope:
            if after_all:
                torch.stack([model(x) for x in batches]).sum().backward()
            else:
                for x in batches:
                    model(x).backward()
            optimizer.step()
            run = scope.run()
        assert_uses(run, expected)
        # The mean over the forwards.
        assert_time(run, expected, float(np.float32(59 / 3)))


def test_evaluation_in_between_counts_for_nothing() -> None:
    model, x = make("gru"), inputs(20)
    expected = roles(*by_hand(model, x))
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, every=1) as scope:
        loss = model(x)
        with torch.no_grad():
            model(inputs(50))
        loss.backward()
        optimizer.step()
        run = scope.run()
    assert_uses(run, expected)
    assert_time(run, expected, 20)


def test_under_a_grad_scaler() -> None:
    model, x = make("lstm"), inputs(20)
    expected = roles(*by_hand(model, x))
    optimizer, scaler = SGD(model.parameters(), lr=0.0), GradScaler("cpu", init_scale=1000.0)
    with watch(model, optimizer, every=1, scaler=scaler) as scope:
        scaler.scale(model(x)).backward()
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    assert_uses(run, expected)
    assert_time(run, expected, 20)


class Shared(nn.Module):
    """Any module that is called often: a linear layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(UNITS, UNITS)
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.cell(x).tanh()
        return x.square().sum()


@support(
    "Recurrent nets",
    "any module with more than sixteen uses",
    outputs="right",
    output_gradients="right",
)
def test_any_module_beyond_sixteen_uses() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(BATCH, UNITS)
    optimizer = SGD(model.parameters(), lr=0.0)
    weight, bias = (p.detach().double() for p in model.cell.parameters())
    with watch(model, optimizer, every=1) as scope:
        for model.times in (3, 50, 3):
            model(x).backward()
            optimizer.step()
        run = scope.run()
    for row, times in enumerate((3, 50, 3)):
        hidden, outputs = x.double(), []
        for _ in range(times):
            outputs.append((hidden @ weight.T + bias).requires_grad_())
            hidden = outputs[-1].tanh()
        gradients = torch.autograd.grad(hidden.square().sum(), outputs)
        expected = dict(roles(outputs, gradients))
        if row == 0:
            # Not known yet that it will be used that often: each use has its row.
            del expected["cell#middle"], expected["cell#last"]
        assert_uses(run, expected, row)
    # Its uses need not be time steps.
    assert np.isnan(run.modules["time_grad_first"]).all()
    assert np.isnan(run.modules["time_steps"]).all()


def test_a_loop_of_the_users_that_calls_the_cell() -> None:
    """Truncated in the middle: two stretches of time in one step."""
    model, x = make("gru"), inputs(24)
    optimizer = SGD(model.parameters(), lr=0.0)
    gradients: list[Tensor] = []

    def stretch(steps: Tensor, h: Tensor | None) -> Tensor:
        for step in steps:
            h = model.cell(step, h)
            assert h is not None
            h.register_hook(gradients.append)
        assert h is not None
        h.square().sum().backward()
        return h.detach()

    with watch(model, optimizer, every=1) as scope:
        # As the model's own forward is never called, its parts are followed from the second step.
        for _ in range(2):
            gradients.clear()
            stretch(x[10:], stretch(x[:10], None))
            optimizer.step()
        run = scope.run()
    # Each stretch arrives backwards.
    stretches = [gradients[9::-1], gradients[:9:-1]]
    assert [len(each) for each in stretches] == [10, 14]
    row = len(run.modules.steps) - 1
    for end, place in (("first", 0), ("middle", None), ("last", -1)):
        uses = [each[len(each) // 2 if place is None else place] for each in stretches]
        norm = math.hypot(*(float(use.norm()) for use in uses))
        column = run.modules.names.index("cell")
        assert run.modules[f"time_grad_{end}"][row, column] == pytest.approx(norm, rel=1e-4)


def test_training_does_not_change() -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Loop(nn.LSTMCell(FEATURES, UNITS))
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scope = watch(model, optimizer, every=1) if watched else None
        for number in range(5):
            optimizer.zero_grad()
            model(inputs(15 + number, seed=number)).backward()
            optimizer.step()
        if scope is not None:
            scope.close()
        results.append([*model.parameters(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    class Saved(nn.Module):
        def __init__(self, loop: Loop) -> None:
            super().__init__()
            self.cell = loop.cell
            self.loop = [loop]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.loop[0], x, use_reentrant=reentrant)
            return out

    loop, x = make("gru"), inputs(20)
    expected = roles(*by_hand(loop, x))
    run = recorded(Saved(loop), x.requires_grad_())
    if reentrant:
        # Which use a replay repeats can't be told.
        assert np.isnan(run.modules["time_grad_first"]).all()
    else:
        assert_uses(run, expected)
        assert_time(run, expected, 20)


def test_no_output_is_kept() -> None:
    class Watching(Loop):
        """Lets go of what it computes, and looks what is still alive."""

        def forward(self, x: Tensor) -> Tensor:
            alive = []
            for step in x:
                state = self.cell(step)
                alive.append(weakref.ref(state.untyped_storage()))
                loss = state.sum()
                del state
            gc.collect()
            self.alive = sum(each() is not None for each in alive[:-1])
            total: Tensor = loss
            return total

    torch.manual_seed(0)
    # A sum keeps nothing, and of this cell the graph of the other steps is gone.
    model = Watching(nn.RNNCell(FEATURES, UNITS))
    recorded(model, inputs(30))
    assert model.alive == 0


def test_many_uses_are_followed_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.capture.uses.MOST_USES", 30)
    model = make("tanh")
    run = recorded(model, inputs(29), inputs(60))
    column = run.modules.names.index("cell#last")
    norms = run.modules["output_grad_norm"][:, column]
    assert [math.isfinite(norm) for norm in norms] == [True, False]
    first = run.modules["time_grad_last"][:, run.modules.names.index("cell")]
    assert [math.isfinite(norm) for norm in first] == [True, False]
    assert any("not its middle and last use" in p["message"] for p in run.meta["problems"])
