"""Level "deep": histograms of weights, updates, outputs and the gradients arriving there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradscope.capture import statistics
from gradscope.capture.scope import watch
from gradscope.errors import GradscopeWarning
from gradscope.record import Histograms, Run
from gradscope.reporters.provenance import particulars
from tests.capture.reference import wide
from tests.capture.test_histograms import Counts, counted

STEPS = 3
KINDS = ("weight", "update", "output", "output_grad")
Seen = dict[str, dict[str, NDArray[Any]]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 4))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


class Witness:
    """Keeps what passes, in the order in which it does, by module; and the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[Seen] = []
        self._model = model
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._output, name or "(root)"))

    def begin(self) -> None:
        self.steps.append({kind: {} for kind in KINDS})

    def _output(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        if output.requires_grad:
            self._keep("output", name, output)
            output.register_hook(partial(self._keep, "output_grad", name))

    def _keep(self, kind: str, name: str, tensor: Tensor) -> None:
        earlier = self.steps[-1][kind].get(name, np.empty(0))
        self.steps[-1][kind][name] = np.concatenate([earlier, wide(tensor)])

    def before_update(self) -> None:
        for name, parameter in self._model.named_parameters():
            self.steps[-1]["weight"][name] = parameter.detach().numpy().copy().ravel()

    def after_update(self) -> None:
        for name, parameter in self._model.named_parameters():
            change = parameter.detach().numpy().ravel() - self.steps[-1]["weight"][name]
            self.steps[-1]["update"][name] = change


def train(
    model: nn.Module,
    after: Callable[[Tensor], object] = id,
    *,
    witness: Witness | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    scaler: GradScaler | None = None,
    size: int = 16,
) -> None:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step, size)
        if witness is not None:
            witness.begin()
        loss = F.cross_entropy((forward or model)(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if witness is not None:
            witness.before_update()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if witness is not None:
            witness.after_update()
        optimizer.zero_grad()
        after(loss.detach())


def watched(model: nn.Module, folder: Path, **options: Any) -> Run:
    scaler = options.get("scaler")
    with watch(model, log_dir=folder, every=1, level="deep", scaler=scaler) as scope:
        train(model, lambda loss: scope.log(loss=loss), **options)
        return scope.run()


def witnessed(build: Callable[[], nn.Module], **options: Any) -> list[Seen]:
    model = build()
    witness = Witness(model)
    train(model, witness=witness, **options)
    return witness.steps


def row_of(histograms: Histograms, index: int, name: str) -> Counts:
    found: Counts = histograms.at(index)[histograms.names.index(name)].astype(np.int64)
    return found


def assert_all_counted(run: Run, steps: list[Seen], kinds: tuple[str, ...] = KINDS) -> None:
    assert set(run.deep) == set(KINDS)
    for kind in kinds:
        assert run.deep[kind].steps.tolist() == list(range(STEPS))
        for index, step in enumerate(steps):
            # Of these nets all are measured, and nothing else.
            assert set(run.deep[kind].names) == set(step[kind]) != set()
            for name, entries in step[kind].items():
                found, expected = row_of(run.deep[kind], index, name), counted(entries)
                assert expected.sum() > 0
                np.testing.assert_array_equal(found, expected, err_msg=f"{kind} {index} {name}")


def test_every_entry_is_counted(tmp_path: Path) -> None:
    run = watched(net(), tmp_path)
    assert_all_counted(run, witnessed(net))
    assert run.meta["problems"] == []
    assert run.histograms.at(0).any()


class Checkpointed(nn.Module):
    """A part of it runs again in the backward pass; another runs aside, without gradients."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.part, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self._reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.no_grad():
            self.head(x)
        x = checkpoint(self.part, x, use_reentrant=self._reentrant)
        out: Tensor = self.head(torch.tanh(x))
        return out


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_repeats_is_counted_once(reentrant: bool, tmp_path: Path) -> None:
    run = watched(Checkpointed(reentrant=reentrant), tmp_path)
    outputs, arrived = run.deep["output"], run.deep["output_grad"]
    for index in range(STEPS):
        for name in ("stem", "part"):
            assert row_of(outputs, index, name).sum() == 16 * 8, name
            assert row_of(arrived, index, name).sum() == 16 * 8, name
        assert row_of(arrived, index, "head").sum() + row_of(arrived, index, "head#1").sum() == 64


def test_uses_and_micro_batches_add_up(tmp_path: Path) -> None:
    model = net()
    seen: list[Counts] = []
    model[1].register_forward_hook(lambda *given: seen.append(counted(wide(given[2]))))  # type: ignore[index]
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level="deep") as scope:
        for part in range(3):
            x, y = batch(part)
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scope.log(loss=0.0)
        run = scope.run()
    np.testing.assert_array_equal(row_of(run.deep["output"], 0, "1"), np.sum(seen, axis=0))


def test_compiled_modules_are_counted_as_eager_ones(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    run = watched(model, tmp_path, forward=compiled)
    assert_all_counted(run, witnessed(net))


def test_output_gradients_are_those_of_the_loss_before_scaling(tmp_path: Path) -> None:
    # A power of two, and twice that: exact in binary.
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    run = watched(net(), tmp_path, scaler=scaler)
    assert run.scalars["loss_scale"].tolist() == [1024.0, 2048.0, 4096.0]
    assert_all_counted(run, witnessed(net), ("output", "output_grad", "weight"))


def test_large_outputs_are_counted_on_a_sample(tmp_path: Path) -> None:
    size = 3_000
    run = watched(net(), tmp_path, size=size)
    steps = witnessed(net, size=size)
    for kind in ("output", "output_grad"):
        # 60,000 entries.
        for name in ("0", "1"):
            found = row_of(run.deep[kind], 0, name)
            entries = steps[0][kind][name]
            sampled = found.sum() / np.count_nonzero(entries) * entries.size
            # Of those that are zero the sample has about the same share.
            assert statistics.SAMPLE * 0.95 < sampled < 2 * statistics.SAMPLE * 1.05
            share = counted(entries) / np.count_nonzero(entries)
            # Four standard errors of the share of a bin.
            np.testing.assert_allclose(found / found.sum(), share, atol=2 / np.sqrt(found.sum()))
    assert "evenly spaced" in particulars(run)["Sampling"]


def test_half_precision_updates_are_exact(tmp_path: Path) -> None:
    """The difference of two bfloat16 numbers is not always one itself."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    before = model.weight.detach().double().numpy().copy()
    optimizer = SGD(model.parameters(), lr=0.7)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level="deep") as scope:
        model(torch.randn(8, 64, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        scope.log(loss=0.0)
        run = scope.run()
    change = model.weight.detach().double().numpy() - before
    np.testing.assert_array_equal(row_of(run.deep["update"], 0, "weight"), counted(change.ravel()))


def test_training_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    bare, model = net(), net()
    train(bare)
    watched(model, tmp_path)
    for one, other in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failure_ends_the_histograms_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(tensor: Tensor) -> Tensor:
        raise RuntimeError(str(tensor.shape))

    monkeypatch.setattr(statistics, "evenly_spaced", failing)
    with pytest.warns(GradscopeWarning, match="histograms disabled"):
        run = watched(net(), tmp_path)
    assert [problem["part"] for problem in run.meta["problems"]] == ["histograms"]
    assert np.isfinite(run.modules["output_rms"]).all()
    assert np.isfinite(run.modules["output_grad_norm"]).all()


@pytest.mark.parametrize("level", ["parameters", "full"])
def test_other_levels_count_no_more_than_gradients(level: str, tmp_path: Path) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level=level) as scope:
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scope.log(loss=0.0)
        run = scope.run()
    assert run.deep == {}
    assert bool(run.histograms) == (level == "full")
