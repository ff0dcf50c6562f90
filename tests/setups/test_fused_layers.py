"""Torch runs a transformer's layer as one kernel where nothing is hooked: it still does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradscope.capture.scope import watch
from tests.setups.support import support

FUSED = "_transformer_encoder_layer_fwd"


class Features(nn.Module):
    """A frozen encoder, always in evaluation mode, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder.requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.train()

    def train(self, mode: bool = True) -> "Features":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


class Encoder(nn.Module):
    """One that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every run of the fused kernel."""
    runs: list[None] = []
    kernel: Callable[..., Any] = getattr(torch, FUSED)

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(None)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, FUSED, counted)
    return runs


def batch(number: int) -> Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(number))


def train(model: nn.Module, optimizer: SGD, *, evaluate: bool) -> list[Tensor]:
    outputs = []
    for number in range(3):
        for part in range(2):
            out = model(batch(2 * number + part))
            out.square().mean().backward()
            outputs.append(out.detach().clone())
            if evaluate:
                # Between two micro-batches: the step is open.
                model.eval()
                with torch.no_grad():
                    outputs.append(model(batch(100)))
                model.train()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def made(build: type[nn.Module]) -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = build()
    return model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@support("Modules", "`nn.TransformerEncoderLayer`, frozen: torch's fused kernel", outputs="unknown")
def test_frozen_layer_in_training(fused: list[None], tmp_path: Path) -> None:
    expected = train(*made(Features), evaluate=False)
    runs = len(fused)
    assert runs == 6
    model, optimizer = made(Features)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        found = train(model, optimizer, evaluate=False)
        run = scope.run()
    assert len(fused) == 2 * runs
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "head" in run.modules.names
    assert not any(name.startswith("encoder") for name in run.modules.names)
    reasons = run.meta["coverage"]["modules"]["reasons"]
    assert "frozen" in reasons["encoder.linear1"]


@support(
    "Modules",
    "`nn.TransformerEncoderLayer`, evaluated within a step: torch's fused kernel",
    outputs="right",
)
def test_evaluation_within_a_recorded_step(fused: list[None], tmp_path: Path) -> None:
    expected = train(*made(Encoder), evaluate=True)
    runs = len(fused)
    assert runs == 6
    model, optimizer = made(Encoder)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        found = train(model, optimizer, evaluate=True)
        run = scope.run()
    assert len(fused) == 2 * runs
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # The root's output, of both micro-batches and of them alone.
    root = run.modules.names.index("(root)")
    for step in range(3):
        seen = torch.cat([expected[4 * step], expected[4 * step + 2]]).double()
        rms = float(seen.square().mean().sqrt())
        assert float(run.modules["output_rms"][step, root]) == pytest.approx(rms, rel=1e-5)
        inner = run.modules.names.index("layer.linear1")
        assert run.modules["output_grad_norm"][step, inner] > 0
