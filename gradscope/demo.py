"""Three real trainings on scikit-learn's digits, watched and diagnosed: `gradscope demo`."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from gradscope.analysis.report import Report
from gradscope.capture.scope import watch
from gradscope.errors import UsageError

_DEPTH = 20
_WIDTH = 64
_PIXELS = 64
_CLASSES = 10
_STEPS = 300
_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Training:
    """One of the three: what it is, and how it is built."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    learning_rate: float


def _chain(activation: type[nn.Module]) -> nn.Sequential:
    """linear1, sigmoid1, linear2, …: names that a report can speak of."""
    model = nn.Sequential()
    width = _PIXELS
    for number in range(1, _DEPTH):
        model.add_module(f"linear{number}", nn.Linear(width, _WIDTH))
        model.add_module(f"{activation.__name__.lower()}{number}", activation())
        width = _WIDTH
    model.add_module(f"linear{_DEPTH}", nn.Linear(width, _CLASSES))
    return model


def _sigmoid() -> nn.Module:
    """PyTorch's default initialization."""
    return _chain(nn.Sigmoid)


def _unscaled_relu() -> nn.Module:
    """Weights from N(0, 1), whatever the width."""
    model = _chain(nn.ReLU)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return model


class _ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.linear = nn.Linear(_WIDTH, _WIDTH)
        self.relu = nn.ReLU()
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.relu(self.linear(self.norm(x)))
        return out


def _residual() -> nn.Module:
    """He initialization, residual connections, LayerNorm."""
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(_PIXELS, _WIDTH))
    for number in range(1, _DEPTH - 1):
        model.add_module(f"block{number}", _ResidualBlock())
    model.add_module("norm", nn.LayerNorm(_WIDTH))
    model.add_module("head", nn.Linear(_WIDTH, _CLASSES))
    return model


_TRAININGS = (
    _Training("sigmoid", "20 layers, sigmoid, PyTorch's default initialization", _sigmoid, 0.1),
    _Training("unscaled-relu", "20 layers, ReLU, weights from N(0, 1)", _unscaled_relu, 0.01),
    _Training(
        "residual", "20 layers, ReLU, He initialization, residual, LayerNorm", _residual, 0.05
    ),
)


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (an extra of the demo's)
    except ImportError:
        message = "the demo's data comes with scikit-learn: pip install 'torch-gradscope[demo]'"
        raise UsageError(message) from None
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16  # 16 grey levels
    return pixels, torch.tensor(digits.target)


def _batches(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        drawn = torch.randint(len(pixels), (_BATCH,), generator=generator)
        yield pixels[drawn], labels[drawn]


def _train(training: _Training, log_dir: Path, advance: Callable[[], None]) -> Report:
    """An ordinary training loop; the two lines with `scope` are gradscope's."""
    torch.manual_seed(0)
    model = training.model()
    optimizer = torch.optim.SGD(model.parameters(), training.learning_rate)
    with watch(model, optimizer, log_dir=log_dir) as scope:
        for pixels, labels in _batches(*_digits()):
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
            advance()
    return scope.report()


def run_demo(folder: Path) -> list[Report]:
    """Train the three, print each verdict, write runs and HTML reports, say how to open them."""
    console = Console()
    folder = _unused(folder)
    threads = torch.get_num_threads()
    # Layers of 64 units are slower on several threads than on one.
    torch.set_num_threads(1)
    try:
        reports = [_one(console, folder, number) for number in range(1, len(_TRAININGS) + 1)]
    finally:
        torch.set_num_threads(threads)
    console.rule("Look at them", align="left")
    for training in _TRAININGS:
        page = (folder / f"{training.name}.html").resolve()
        console.print(f"  {page.as_uri()}", soft_wrap=True, highlight=False)
    runs = " ".join(str(folder / training.name) for training in _TRAININGS)
    for line in (
        f"{_command('tensorboard')} --logdir {folder}",
        f"{_command('gradscope')} report {runs} -o {folder / 'side-by-side.html'}",
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    return reports


def _command(name: str) -> str:
    """What to type for a program: where it is, if the environment it came with is not active."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).with_name(name)
    return os.path.relpath(beside) if beside.exists() else name


def _one(console: Console, folder: Path, number: int) -> Report:
    training = _TRAININGS[number - 1]
    console.rule(f"{number} of {len(_TRAININGS)}: {training.title}", align="left")
    with _progress(console) as progress:
        task = progress.add_task("training", total=_STEPS)
        report = _train(training, folder / training.name, lambda: progress.advance(task))
    report.print()
    report.write(folder / f"{training.name}.html")
    console.print()
    return report


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _unused(folder: Path) -> Path:
    """The folder, or a sibling if it holds an earlier demo."""
    wanted, number = folder, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
