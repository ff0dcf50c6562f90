"""torch.compile: the same numbers as without it, and the same graphs as without gradscope."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradscope.capture.scope import watch
from tests.capture.subjects import SUBJECTS
from tests.capture.test_modules import assert_modules, expected_of, one_step
from tests.setups.compiling import (
    WAYS,
    Block,
    Blocks,
    Compile,
    Eager,
    Forward,
    assert_equals_eager,
    batch,
    eager_twin,
    fresh,
    graphs,
    missed,
    regional,
    train,
    whole,
)
from tests.setups.support import support

# Torch's own.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            marks=support(
                "torch.compile",
                label,
                parameters="right",
                outputs="right",
                output_gradients="right",
            ),
        )
        for way, label in {
            "whole": "the whole model, compiled before or after `watch`",
            "whole, torch's class": "the whole model, compiled before or after `watch`",
            "in place": "the whole model in place, `model.compile()`",
            "regional": "every block in place (regional)",
            "replaced": "every block replaced by a compiled one",
            "one part": "one part",
            "function": "a function around the model",
        }.items()
    ],
)
def test_numbers_are_eagers_and_graphs_those_without_gradscope(
    way: str, when: str, tmp_path: Path
) -> None:
    build, compile_ = WAYS[way]
    bare = fresh(build)
    unwatched = train(bare, compile_(bare, backend="aot_eager", fullgraph=True), 4)
    expected = graphs()
    torch._dynamo.reset()
    counters.clear()

    model = fresh(build)
    forward: Forward = model
    if when == "before":
        forward = compile_(model, backend="aot_eager", fullgraph=True)
    watched = forward if isinstance(forward, nn.Module) else model
    # Every second step: recording is switched on and off.
    with watch(watched, log_dir=tmp_path, every=2) as scope:
        if when == "after":
            forward = compile_(model, backend="aot_eager", fullgraph=True)
        found = train(model, forward, 4, lambda loss: scope.log(loss=loss))
        assert graphs() == expected
        run = scope.run()
    assert found.same_bits(unwatched)
    assert missed(run) == []
    assert list(run.modules.steps) == [0, 2]
    assert_equals_eager(run.modules, eager_twin(build, 4))
    norms = [float(gradient.double().norm()) for gradient in unwatched.gradients]
    names = [name for name, _ in fresh(build).named_parameters()]
    for row, step in enumerate(run.parameters.steps):
        for index, name in enumerate(names):
            found_norm = run.parameters["grad_norm"][row, run.parameters.names.index(name)]
            assert np.isclose(found_norm, norms[step * len(names) + index], rtol=1e-5), name
    assert "_orig_mod" not in "".join([*run.modules.names, *run.parameters.names])
    coverage = run.meta["coverage"]["modules"]
    assert coverage["seen"] == coverage["expected"]
    assert coverage["output_gradients_seen"] == coverage["output_gradients_expected"] > 0
    assert run.meta["coverage"]["forwards"] == 4


# What modules do.


@pytest.mark.parametrize("subject", SUBJECTS)
def test_outputs_of_every_kind(subject: str, tmp_path: Path) -> None:
    """Structured outputs, changes in place, several uses: against autograd by hand."""
    torch.manual_seed(0)
    given = SUBJECTS[subject]()
    expected = expected_of(given, [(given.x, given.y)])
    # No function that is called in a graph is told of.
    expected.pop("attention/softmax#0", None)
    # Torch leaves recurrent nets to Python.
    forward = torch.compile(given.model, backend="aot_eager", fullgraph=subject != "lstm")
    run = one_step(given.model, lambda: [F.cross_entropy(forward(given.x), given.y)], tmp_path)
    assert_modules(run.modules, expected)
    assert set(run.modules.names) == set(expected)
    assert missed(run) == []


class Checkpointed(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        out: Tensor = self.head(x)
        return out


class Shared(nn.Module):
    """A block that runs three times; only what the first and the last one return is needed."""

    def __init__(self, *, needed: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList([Block()])
        self.head = nn.Linear(8, 5)
        self.needed = needed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.layers[0](x)
        aside = self.layers[0](x)
        out: Tensor = self.head(x + aside if self.needed else x)
        return out


Loop = Callable[[nn.Module, Forward, Callable[[Tensor], object]], None]


def plain_loop(model: nn.Module, forward: Forward, after: Callable[[Tensor], object]) -> None:
    train(model, forward, 3, after)


def varied(model: nn.Module, forward: Forward, after: Callable[[Tensor], object]) -> None:
    """Batches of several sizes, and evaluation in between."""
    optimizer = SGD(model.parameters(), lr=0.05)
    for step, size in enumerate((12, 12, 7, 9)):
        x, y = batch(step, size)
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(loss.detach())
        with torch.no_grad():
            forward(x + 100)


def accumulated(model: nn.Module, forward: Forward, after: Callable[[Tensor], object]) -> None:
    """Two forwards, then two backwards, then a third of each."""
    optimizer = SGD(model.parameters(), lr=0.05)
    for step in range(2):
        losses = []
        for part in range(2):
            x, y = batch(10 * step + part)
            losses.append(F.cross_entropy(forward(x), y))
        for loss in losses:
            loss.backward()
        x, y = batch(10 * step + 5)
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(losses[0].detach())


def kept(model: nn.Module, forward: Forward, after: Callable[[Tensor], object]) -> None:
    """One graph, two backwards."""
    optimizer = SGD(model.parameters(), lr=0.05)
    x, y = batch(0)
    loss = F.cross_entropy(forward(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    after(loss.detach())


CASES: dict[str, tuple[Callable[[], nn.Module], Compile, Loop]] = {
    "checkpoint": (Checkpointed, whole, plain_loop),
    "checkpoint around compiled blocks": (Checkpointed, regional, plain_loop),
    "several uses": (Shared, whole, plain_loop),
    "several runs of one graph": (Shared, regional, plain_loop),
    "several sizes, evaluation": (Blocks, whole, varied),
    "several sizes, evaluation, regional": (Blocks, regional, varied),
    "accumulation": (Blocks, whole, accumulated),
    "accumulation, regional": (Shared, regional, accumulated),
    "graph kept": (Blocks, whole, kept),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=support(
                "torch.compile", case, parameters="right", outputs="right", output_gradients="right"
            ),
        )
        for case in CASES
    ],
)
def test_loops_as_without_torch_compile(case: str, tmp_path: Path) -> None:
    build, compile_, loop = CASES[case]
    backend = "aot_eager"
    bare = fresh(build)
    loop(bare, compile_(bare, backend=backend, fullgraph=True), id)
    expected = graphs()
    torch._dynamo.reset()
    counters.clear()
    model = fresh(build)
    forward = compile_(model, backend=backend, fullgraph=True)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        loop(model, forward, lambda loss: scope.log(loss=loss))
        assert graphs() == expected
        run = scope.run()
    # It repeats nothing.
    twin = fresh(Blocks if build is Checkpointed else build)
    eager = Eager(twin)
    loop(twin, twin, eager.step_ends)
    assert_equals_eager(run.modules, eager)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, bare.state_dict()[name]), name


@support(
    "torch.compile",
    "several runs of one graph, of which some get no gradient",
    outputs="right",
    output_gradients="unknown",
)
def test_gradients_that_cannot_be_told_apart_are_left_out(tmp_path: Path) -> None:
    """Of three runs of one graph, the last gets no gradient: which one did is not known."""
    model = fresh(partial(Shared, needed=False))
    forward = regional(model, backend="aot_eager", fullgraph=True)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        train(model, forward, 2, lambda loss: scope.log(loss=loss))
        run = scope.run()
    norms = run.modules["output_grad_rms"]
    uses = [run.modules.names.index(f"layers.0.inner{use}") for use in ("", "#1", "#2")]
    assert np.isnan(norms[:, uses]).all()
    assert (run.modules["output_rms"][:, uses] > 0).all()
    assert (norms[:, run.modules.names.index("head")] > 0).all()
    assert "layers.0.inner#1" in " ".join(p["message"] for p in run.meta["problems"])


def scaled_loss(forward: Forward, scaler: torch.amp.GradScaler | None, step: int) -> Tensor:
    x, y = batch(step)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(forward(x).float(), y)
    return loss if scaler is None else scaler.scale(loss)


def test_autocast_and_a_grad_scaler(tmp_path: Path) -> None:
    twin = fresh(Blocks)
    eager = Eager(twin)
    scaled_loss(twin, None, 0).backward()
    model = fresh(Blocks)
    forward = whole(model, backend="aot_eager", fullgraph=True)
    optimizer = SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1, scaler=scaler) as scope:
        scaled_loss(forward, scaler, 0).backward()
        scaler.step(optimizer)
        scaler.update()
        run = scope.run()
    # A bfloat16 gradient is rounded at another place where it is scaled.
    assert_equals_eager(run.modules, eager, rtol=1e-2)
    assert missed(run) == []


# With a compiler of machine code.


@support(
    "torch.compile",
    "inductor",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
def test_with_inductor(tmp_path: Path) -> None:
    """Torch's own backend; it needs a C++ compiler, as torch.compile does."""
    bare = fresh(Blocks)
    expected = train(bare, whole(bare, fullgraph=True), 3)
    made = graphs()
    torch._dynamo.reset()
    counters.clear()
    model = fresh(Blocks)
    forward = whole(model, fullgraph=True)
    with watch(model, log_dir=tmp_path, every=2) as scope:
        found = train(model, forward, 3, lambda loss: scope.log(loss=loss))
        assert graphs() == made
        run = scope.run()
    assert found.same_bits(expected)
    assert_equals_eager(run.modules, eager_twin(Blocks, 3))
