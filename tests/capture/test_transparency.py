"""Training does not change by one bit, and nothing is left behind."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.capture.scope import Scope, watch
from tests.capture import trainings
from tests.capture.trainings import (
    Build,
    Cnn,
    Nobody,
    Recurrent,
    Training,
    adamw,
    built,
    lbfgs,
    mlp_model,
    plain,
    with_closure,
)


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
    )


def large_net() -> nn.Module:
    """Beyond 32,768 weights: their updates are sampled."""
    return nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 300), nn.Dropout(), nn.Linear(300, 5))


CASES: dict[str, Build] = {
    "large layers": lambda: plain(large_net(), trainings.vectors, adamw),
    "adamw with dropout": lambda: plain(dropout_net(), trainings.vectors, adamw),
    "cnn": lambda: plain(Cnn(), trainings.images, adamw),
    "lstm": lambda: plain(Recurrent(), trainings.sequences, adamw),
    "lbfgs with closure": lambda: with_closure(mlp_model(), trainings.vectors, lbfgs),
    "adamw with closure": lambda: with_closure(dropout_net(), trainings.vectors, adamw),
    "accumulation": trainings.accumulated,
    "sparse embedding": trainings.sparse_embedding,
}
CADENCES: dict[str, dict[str, int]] = {"every step": {"every": 1}, "default": {}}


def bits(value: object) -> object:
    """The value with its tensors as bytes, so that == compares every bit, NaN too."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense().contiguous()
        return (str(dense.dtype), tuple(dense.shape), dense.numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value


def outcome(training: Training, after_step: Callable[[Tensor], None]) -> dict[str, object]:
    """All that twenty steps lead to, gradients and random numbers included."""
    losses = []
    # Once: a random number that gradscope takes shifts all that follow.
    torch.manual_seed(1)
    for number in range(20):
        loss = training.take_step(number, Nobody())
        losses.append(loss.detach().clone())
        after_step(loss)
    return {
        "losses": bits(losses),
        "state": bits(dict(training.model.state_dict())),
        "gradients": bits([p.grad for p in training.model.parameters()]),
        "optimizers": bits([optimizer.state_dict() for optimizer in training.optimizers]),
        "random": bits(torch.get_rng_state()),
    }


@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_for_bit_the_same(name: str, cadence: str, tmp_path: Path) -> None:
    expected = outcome(built(CASES[name]), lambda _: None)
    training = built(CASES[name])
    options: dict[str, Any] = CADENCES[cadence]
    with watch(training.model, training.optimizers, log_dir=tmp_path, **options) as scope:
        found = outcome(training, lambda loss: scope.log(loss=loss))
        recorded = scope.run().recorded_steps.tolist()
        assert recorded == list(range(20)) if options else set(range(10)) <= set(recorded)
    for what, value in expected.items():
        assert found[what] == value, what


def test_state_dict_has_the_same_keys_while_watched(tmp_path: Path) -> None:
    model = dropout_net()
    keys = list(model.state_dict())
    with watch(model, log_dir=tmp_path):
        assert list(model.state_dict()) == keys


# What is left behind.


def _registered(holder: object) -> dict[str, object]:
    """Every attribute of the object that torch keeps hooks in, by how many there are."""
    return {
        name: len(value)
        for name, value in vars(holder).items()
        if "hook" in name and isinstance(value, dict)
    }


def traces(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, object]:
    """The attributes and hooks of all that gradscope touches."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"module {name}"] = (sorted(vars(module)), _registered(module))
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (
            sorted(vars(parameter)),
            len(parameter._backward_hooks or ()),
            len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()),
        )
    for index, optimizer in enumerate(optimizers):
        found[f"optimizer {index}"] = (sorted(vars(optimizer)), _registered(optimizer))
        found[f"groups {index}"] = [sorted(group) for group in optimizer.param_groups]
    found["all optimizers"] = _registered(torch_optimizer)
    found["all modules"] = _registered(nn.modules.module)
    return found


@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("ending", ["between steps", "after forward", "after backward"])
def test_nothing_is_left_after_close(given: bool, ending: str, tmp_path: Path) -> None:
    training = built(CASES["cnn"])
    optimizer = training.optimizers[0]
    criterion = nn.CrossEntropyLoss()
    # Torch adds to the optimizer's own dicts at the first step.
    training.step(0, Nobody())
    before = traces(training.model, [optimizer]) | traces(criterion, [])
    scope = watch(
        training.model, optimizer if given else None, criterion, log_dir=tmp_path, every=1
    )
    training.step(1, Nobody())
    training.step(2, Nobody())
    x, y = trainings.images()
    if ending != "between steps":
        loss = criterion(training.model(x), y)
        if ending == "after backward":
            loss.backward()
    assert traces(training.model, [optimizer]) != before
    scope.close()
    assert traces(training.model, [optimizer]) | traces(criterion, []) == before


def test_module_hooks_exist_only_while_a_step_is_recorded(tmp_path: Path) -> None:
    training = built(CASES["cnn"])
    model, optimizer = training.model, training.optimizers[0]

    def hooked() -> list[str]:
        children = ((name, m) for name, m in model.named_modules() if name)
        return [name for name, m in children if any(_registered(m).values())]

    with watch(model, optimizer, log_dir=tmp_path, every=2):
        assert hooked() == []
        for number in range(4):
            x, y = trainings.images()
            loss = F.cross_entropy(model(x), y)
            assert bool(hooked()) == (number % 2 == 0)
            loss.backward()
            optimizer.step()
            assert hooked() == []


def test_abandoned_scope_does_not_keep_the_model_alive(tmp_path: Path) -> None:
    model = mlp_model()
    scope = watch(model, log_dir=tmp_path, every=1)
    model(torch.ones(1, 6)).sum().backward()
    scope.close()
    gone = weakref.ref(model)
    del model, scope
    gc.collect()
    assert gone() is None


# Copies.


@pytest.fixture
def mid_step(tmp_path: Path) -> Iterator[tuple[nn.Module, Optimizer, Scope]]:
    """A model between forward and backward of a recorded step."""
    training = built(CASES["adamw with dropout"])
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        training.step(0, Nobody())
        training.model(torch.ones(4, 6)).sum()
        yield training.model, training.optimizers[0], scope


def _pickled(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301  (its own bytes)
    assert isinstance(copied, nn.Module)
    return copied


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied = torch.load(buffer, weights_only=False)
    assert isinstance(copied, nn.Module)
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_copy_made_in_mid_step_trains_unseen(
    way: str, mid_step: tuple[nn.Module, Optimizer, Scope]
) -> None:
    model, optimizer, scope = mid_step
    copied = COPIES[way](model)
    assert bits(dict(copied.state_dict())) == bits(dict(model.state_dict()))
    own = SGD(copied.parameters(), lr=0.1)
    for _ in range(3):
        copied(torch.full((4, 6), 1000.0)).sum().backward()
        own.step()
    model.zero_grad()
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    run = scope.run()
    assert list(run.steps) == [0, 1]
    assert run.signals["absmax"][1, run.signals.names.index("input")] == 1
    assert run.meta["coverage"]["optimizer_steps"] == 2
    assert run.meta["problems"] == []


@pytest.mark.parametrize("way", COPIES)
def test_copy_made_inside_a_forward(way: str, tmp_path: Path) -> None:
    training = built(CASES["adamw with dropout"])
    model = training.model
    copies: list[nn.Module] = []
    with watch(model, training.optimizers, log_dir=tmp_path, every=1) as scope:

        def take_copy(*_: object) -> None:
            # A local function can't be pickled itself.
            handle.remove()
            copies.append(COPIES[way](model))

        handle = list(model.children())[-1].register_forward_hook(take_copy)
        x, y = trainings.vectors()
        F.cross_entropy(model(x), y).backward()
        training.optimizers[0].step()
        run = scope.run()
    assert len(copies) == 1
    assert list(run.steps) == [0]
    assert run.meta["problems"] == []


def test_optimizer_copies_and_its_state_saves(
    mid_step: tuple[nn.Module, Optimizer, Scope],
) -> None:
    _, optimizer, _ = mid_step
    copied = pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    assert bits(copied.state_dict()) == bits(optimizer.state_dict())
    assert bits(copy.deepcopy(optimizer).state_dict()) == bits(optimizer.state_dict())


def test_saved_model_loads_where_gradscope_is_not_installed(
    mid_step: tuple[nn.Module, Optimizer, Scope], tmp_path: Path
) -> None:
    model, _, _ = mid_step
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys\n"
        "sys.modules['gradscope'] = None\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "model(torch.ones(4, 6)).sum().backward()\n"
        "print(len(list(model.parameters())))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list(model.parameters()))


# What it costs the training thread.


class CountOps(TorchDispatchMode):
    """Counts what makes a host wait for a device: reading a number, copying between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        name = str(func)
        result = func(*args, **(kwargs or {}))
        if name in {"aten._local_scalar_dense.default", "aten.nonzero.default"}:
            self.counts[name] += 1
        if "_to_copy" in name and args[0].device != result.device:
            self.counts[name] += 1
        return result


@pytest.mark.parametrize("level", ["full", "deep"])
@pytest.mark.parametrize("name", ["adamw with dropout", "cnn", "lbfgs with closure"])
def test_no_number_is_read_from_the_device_within_a_step(
    name: str, level: str, tmp_path: Path
) -> None:
    def counted(training: Training, log: Callable[[Tensor], None]) -> Counter[str]:
        training.step(0, Nobody())
        ops = CountOps()
        with ops:
            for number in (1, 2, 3):
                log(training.step(number, Nobody()))
        return ops.counts

    expected = counted(built(CASES[name]), lambda _: None)
    training = built(CASES[name])
    options: dict[str, Any] = {"log_dir": tmp_path, "every": 1, "level": level}
    with watch(training.model, training.optimizers, **options) as scope:
        found = counted(training, lambda loss: scope.log(loss=loss, target=torch.ones(3)))
        run = scope.run()
    assert len(run.recorded_steps) == 4
    assert found == expected


def test_no_tensor_of_the_user_is_kept_alive(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = adamw(model)
    criterion = nn.CrossEntropyLoss()
    dropped: list[weakref.ref[Tensor]] = []
    with watch(model, optimizer, criterion, log_dir=tmp_path, every=1) as scope:
        model[0].register_forward_hook(lambda *seen: dropped.append(weakref.ref(seen[2])))

        def step() -> None:
            x, y = trainings.vectors()
            out = model(x)
            loss = criterion(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, output=out, target=y, extra=loss)
            gradients = [p.grad for p in model.parameters()]
            dropped.extend(weakref.ref(t) for t in (x, y, out, loss, *gradients) if t is not None)

        for _ in range(3):
            step()
        optimizer.zero_grad()
        scope.run()
        gc.collect()
        assert [reference() for reference in dropped if reference() is not None] == []


def test_graph_of_a_step_that_is_never_finished_is_freed(tmp_path: Path) -> None:
    """A forward without backward, as in a loop that skips a batch."""
    model = mlp_model()
    with watch(model, adamw(model), log_dir=tmp_path, every=1):
        out = model(torch.ones(2, 6))
        gone = weakref.ref(out)
        del out
        gc.collect()
        assert gone() is None
