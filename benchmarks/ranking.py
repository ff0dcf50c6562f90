"""Does the ranking before training agree with the loss after it? Six models, trained.

    python -m benchmarks.ranking [MODEL ...] [--seeds 5] [--steps 200]

Each configuration is ranked by one forward and backward (and, where that tells less than half of
them apart, by the loss of the first thirty steps), and trained on a batch of digits at four
learning rates; the best of them counts. Asked is that the first tier holds a configuration whose
loss is within the seeds' interval of the best, holds none that fails to train, and is at most half
of the grid.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradscope
from gradscope.comparison.result import Comparison, Configuration, Interval, interval

# A guess among ten has ln 10 = 2.30; what has not left it by a tenth has not trained.
_FAILED = 0.9 * float(np.log(10))


def mlp() -> nn.Module:
    hidden = [m for _ in range(19) for m in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def cnn() -> nn.Module:
    hidden = [m for _ in range(28) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    first = (nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.ReLU())
    return nn.Sequential(*first, *hidden, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.norms[0](self.first(x)))
        joined: Tensor = self.activation(x + self.norms[1](self.second(inner)))
        return joined


def resnet() -> nn.Module:
    stem = (nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    blocks = (_Block(12) for _ in range(8))
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))


class _Transformer(nn.Module):
    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(0.02 * torch.randn(8, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
            for _ in range(6)
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.squeeze(1)) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        answer: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return answer


def pre_ln() -> nn.Module:
    return _Transformer(norm_first=True)


def post_ln() -> nn.Module:
    return _Transformer(norm_first=False)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x.reshape(len(x), 32, 2))
        answer: Tensor = self.head(outputs[:, -1])
        return answer


_INITIALIZATIONS = ("torch_default", "xavier_uniform", "kaiming_normal", "normal_0.01")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and what is tried on it."""

    make: Callable[[], nn.Module]
    initializations: Sequence[str] = _INITIALIZATIONS
    activations: Sequence[str] = ("relu", "tanh", "gelu")


SUBJECTS = {
    "mlp": Subject(mlp),
    "cnn": Subject(cnn),
    "resnet": Subject(resnet),
    "pre_ln": Subject(pre_ln),
    "post_ln": Subject(post_ln),
    "lstm": Subject(
        _Lstm,
        (
            "torch_default",
            "xavier_uniform",
            "kaiming_normal",
            "orthogonal",
            "normal_1",
            "normal_0.01",
            "constant",
        ),
        ("own",),
    ),
}


def batch(size: int = 64) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images[:size], dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=", ".join(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.models or SUBJECTS:
        subject = SUBJECTS[name]
        comparison = gradscope.compare(
            subject.make,
            batch(),
            nn.functional.cross_entropy,
            initializations=subject.initializations,
            activations=subject.activations,
            seeds=asked.seeds,
            train_steps=asked.steps,
        )
        _tell(name, comparison)


def _tell(name: str, comparison: Comparison) -> None:
    print(f"\n{name}: {len(comparison.layers)} layers, {comparison.seconds:.0f} s")
    print("tier  score  decades  early  loss after  (interval)      learning rate  configuration")
    for c in comparison.configurations:
        loss = _loss(c)
        rate = c.mean("learning_rate")
        print(
            f"{c.tier:4d} {c.score.mean:6.2f} {c.mean('decades'):8.2f} {c.mean('early'):6.3f} "
            f"{loss.mean:11.3g}  ({loss.low:.3g}, {loss.high:.3g})  {rate:8.2g}  "
            f"{c.name}  {c.failure or ''}"
        )
    top = comparison.first_tier
    best = min(comparison.configurations, key=lambda c: _loss(c).mean)
    bound = max(_loss(best).high, _loss(best).mean)
    near = min(_loss(c).mean for c in top) <= bound
    failing = [str(c.name) for c in top if _loss(c).mean >= _FAILED]
    number = len(comparison.configurations)
    print(
        f"first tier {len(top)} of {number} "
        f"({'at most half' if 2 * len(top) <= number else 'MORE THAN HALF'}); "
        f"holds one within the best's interval: {'yes' if near else 'NO'}; "
        f"fail to train in it: {', '.join(failing) or 'none'}; "
        f"rank correlation {comparison.agreement:.2f}"
    )


def _loss(configuration: Configuration) -> Interval:
    return interval([cell.trained for cell in configuration.cells])


if __name__ == "__main__":
    main()
