"""What watching costs: a watched step over a bare one, interleaved in one process."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

import gradscope

STEPS = 150


def mlp() -> tuple[nn.Module, Tensor]:
    """50 layers of width 256, batch 64."""
    layers = [module for _ in range(49) for module in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(64, 256)


def transformer() -> tuple[nn.Module, Tensor]:
    """4 layers of width 256, 4 × 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(4, 64, 256)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "every=1": {"every": 1},
    'every=1, level="parameters"': {"every": 1, "level": "parameters"},
    "every=100": {"every": 100},
}


class Training:
    """A model in training, one timed step at a time."""

    def __init__(self, build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.scope: gradscope.Scope | None = None

    def step(self) -> float:
        """Train a step; the seconds it took."""
        start = time.perf_counter()
        loss = self.model(self.inputs).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scope is not None:
            self.scope.log(loss=loss)
        return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    print("mean step: what a whole run pays; median step: an ordinary one")
    for build in (mlp, transformer):
        for name, setting in SETTINGS.items():
            bare, watched = Training(build), Training(build)
            with gradscope.watch(watched.model, watched.optimizer, **setting) as watched.scope:
                pairs = [(bare.step(), watched.step()) for _ in range(STEPS)]
            base, cost = zip(*pairs, strict=True)
            print(
                f"{build.__name__:12} {name:28} mean {sum(cost) / sum(base):5.2f}  "
                f"median {statistics.median(cost) / statistics.median(base):5.2f}"
            )


if __name__ == "__main__":
    main()
