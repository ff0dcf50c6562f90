"""What sees functional calls changes nothing, and is gone when the forward ends, however."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW
from torch.overrides import TorchFunctionMode

from gradscope.capture import statistics
from gradscope.capture.scope import watch
from tests.setups.calls import Net, batch, calls, messages, modes, recorded, value
from tests.setups.gpt import CALLS, GPT, loss_of


def trained(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int) -> None:
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def of_vectors(model: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    result: Tensor = model(torch.randn(4, 5, 8)).square().mean()
    return result


class Frozen(nn.Module):
    """Torch has a fused kernel for the first part, which rounds otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False).eval()
        self.head = nn.Linear(8, 8)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.attention.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(self.attention(x, x, x, need_weights=False)[0]))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


BITWISE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]] = {
    "gpt": (GPT, loss_of),
    "encoder layers": (encoder, of_vectors),
    "frozen attention": (Frozen, of_vectors),
}


@pytest.mark.parametrize("name", BITWISE)
def test_training_does_not_change_by_one_bit(name: str, tmp_path: Path) -> None:
    build, loss = BITWISE[name]
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = build()
        if watched:
            with watch(model, log_dir=tmp_path, every=2) as scope:
                trained(model, loss, 6)
                run = scope.run()
        else:
            trained(model, loss, 6)
        ends.append((model.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (seen, seen_rng) = ends
    assert all(torch.equal(plain[key], seen[key]) for key in plain)
    assert torch.equal(plain_rng, seen_rng)
    if name == "gpt":
        assert set(calls(run)) == CALLS
    elif name == "frozen attention":
        assert calls(run) == []
        assert any("frozen" in message for message in messages(run))
    else:
        assert "layers.1/relu#0" in calls(run)
        assert "layers.1.self_attn/scaled_dot_product_attention#0" in calls(run)


class Failing(Net):
    """Raises in the middle, where and when it is told to."""

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__(self.checked)

    def checked(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return F.relu(x)


@pytest.mark.parametrize("error", [ValueError("of the user's"), KeyboardInterrupt()])
def test_forward_that_raises(error: BaseException, tmp_path: Path) -> None:
    model = Failing()
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model.error = error
        with pytest.raises(type(error)):
            model(batch())
        if isinstance(error, Exception):
            assert modes() == []
        # Of no forward any more.
        torch.relu(batch().requires_grad_())
        model.error = None
        model(batch()).sum().backward()
        assert modes() == []
        optimizer.step()
        run = scope.run()
    assert calls(run) == ["(root)/relu#0"]
    assert messages(run) == []


def test_interrupt_that_ends_everything(tmp_path: Path) -> None:
    model = Failing()
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), watch(model, log_dir=tmp_path, every=1):
        model(batch())
    assert modes() == []
    assert not model._forward_hooks
    assert not model.first._forward_hooks


def test_exception_that_the_model_catches(tmp_path: Path) -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Failing(), nn.Linear(6, 3)
            self.inner.error = ValueError("in every forward")

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.inner(x)
            except ValueError:
                x = F.relu(x)
            out: Tensor = self.last(torch.tanh(x))
            return out

    run = recorded(Catching(), [batch().requires_grad_()] * 2, tmp_path)
    assert calls(run) == ["(root)/relu#0", "(root)/tanh#0"]


class Counting(TorchFunctionMode):
    """A mode of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_modes_of_the_users_own(tmp_path: Path) -> None:
    inside, around = Counting(), Counting()

    def between(x: Tensor) -> Tensor:
        with inside:
            return F.relu(x)

    with around:
        model = Net(between)
        optimizer = SGD(model.parameters(), lr=0.0)
        with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
            inside.seen.clear()
            model(batch()).sum().backward()
            assert modes() == [around]
            optimizer.step()
            assert calls(scope.run()) == ["(root)/relu#0"]
    assert "relu" in inside.seen
    assert around.seen.count("relu") == 2  # Once when it was built.


def test_mode_that_the_model_leaves_on(tmp_path: Path) -> None:
    left_on = Counting()

    def between(x: Tensor) -> Tensor:
        if left_on not in modes():
            left_on.__enter__()  # type: ignore[no-untyped-call]
        return F.relu(x)

    model = Net(F.relu)
    model.between = between
    with watch(model, log_dir=tmp_path, every=1) as scope:
        model(batch()).sum().backward()
        assert modes() == [left_on]
        left_on.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        scope.step()
        assert calls(scope.run()) == ["(root)/relu#0"]


def test_model_that_calls_itself(tmp_path: Path) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            x = F.relu(self.fc(x))
            return torch.tanh(self(x, depth - 1)) if depth else x

    run = recorded(Recursive(), [batch(), batch()], tmp_path)
    expected = [*(f"relu#{i}" for i in range(3)), *(f"tanh#{i}" for i in range(2))]
    assert calls(run) == [f"(root)/{call}" for call in expected]


def test_watched_model_within_another(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x))

    inner = Net(F.relu)
    outer = Outer(inner)
    with (
        watch(inner, log_dir=tmp_path / "inner", every=1) as first,
        watch(outer, log_dir=tmp_path / "outer", every=1) as second,
    ):
        outer(batch()).sum().backward()
        assert modes() == []
        first.step()
        second.step()
        runs = first.run(), second.run()
    assert [calls(run) for run in runs] == [["(root)/relu#0"], ["inner/relu#0", "(root)/tanh#0"]]
    names = ("(root)/relu#0", "inner/relu#0")
    alone, within = (value(run, "output_rms", name) for run, name in zip(runs, names, strict=True))
    assert alone == within


def test_evaluation_is_not_seen(tmp_path: Path) -> None:
    model = Net(F.relu)
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        loss = model(batch()).sum()
        before = F.relu(model.first(batch())).detach().double().square().mean().sqrt()
        with torch.no_grad():
            model(batch() * 100)
        loss.backward()
        optimizer.step()
        run = scope.run()
    assert calls(run) == ["(root)/relu#0"]
    assert value(run, "output_rms", "(root)/relu#0") == pytest.approx(float(before), rel=1e-5)


def test_parts_that_are_called_without_the_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"generator": Net(F.relu), "critic": Net(torch.tanh)})
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        for _ in range(3):
            model["critic"](batch()).sum().backward()
            model["generator"](batch()).sum().backward()
            optimizer.step()
        assert calls(scope.run()) == []


def test_no_tensor_is_kept(tmp_path: Path) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def between(x: Tensor) -> Tensor:
        scores = torch.bmm(x.unsqueeze(1), x.unsqueeze(2))
        outputs = [scores, scores.softmax(-1), F.relu(x)]
        kept.extend(weakref.ref(output) for output in outputs)
        return outputs[2] + outputs[1].squeeze(1)

    model = Net(between)
    optimizer = SGD(model.parameters(), lr=0.0)
    gc.collect()
    gc.disable()
    try:
        with watch(model, optimizer, log_dir=tmp_path, every=1):
            model(batch()).sum().backward()
            assert all(reference() is None for reference in kept[3:])
            optimizer.step()
            assert len(kept) == 6
    finally:
        gc.enable()


def test_failure_of_a_statistic_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Tensor:
        message = "on purpose"
        raise RuntimeError(message)

    model = Net(torch.tanh)
    optimizer = SGD(model.parameters(), lr=0.0)
    # Of a module none is counted: it fails within the call.
    monkeypatch.setattr(statistics, "count_outside", fails)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        with pytest.warns(UserWarning, match="module outputs disabled: RuntimeError: on purpose"):
            model(batch())
        for _ in range(2):
            assert modes() == []
            model(batch()).sum().backward()
            optimizer.step()
        assert not model.first._forward_hooks
        run = scope.run()
    assert not np.isnan(run.parameters["grad_norm"]).any()
