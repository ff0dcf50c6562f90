"""What watching costs: a watched step over a bare one, side by side in one process.

From the root of the repository: `python -m benchmarks.overhead [mlp] [resnet] [gpt2]`, and
`--seconds` for how long each comparison takes at least. Two trainings of one model take turns, a
round of steps each; what gradscope writes on its own thread counts in the round that caused it. A
ratio is the median over the rounds, but where it says "of all": there it is that of the sums, as
what is rare is what counts. Peers are measured where they are installed.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

import gradscope
from benchmarks.subjects import SUBJECTS, Subject

_DEFAULT_STEPS = 500
_FEWEST_ROUNDS = 5


class Training:
    """A model in training."""

    def __init__(self, subject: Subject, *, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.subject = subject
        self.model, self.inputs = subject.build(), subject.inputs()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.run: nn.Module = torch.compile(self.model) if compiled else self.model  # type: ignore[assignment]
        self.steps = 0
        # Told the loss of each step; after each backward; after each round.
        self.log: Callable[..., object] = lambda loss: None  # noqa: ARG005
        self.extra: Callable[[], object] = lambda: None
        self.end_of_round: Callable[[], object] = lambda: None

    def round(self, steps: int) -> float:
        """Train so many steps; the seconds they took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.subject.loss(self.run, self.inputs)
            loss.backward()
            self.extra()
            self.optimizer.step()
            self.log(loss=loss)
            self.steps += 1
        self.end_of_round()
        return time.perf_counter() - start


Attach = Callable[[Training, ExitStack], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to watch."""

    name: str
    attach: Attach
    of_all: bool = False
    compiled: bool = False


def watch(**settings: Any) -> Attach:
    def attach(training: Training, stack: ExitStack) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        scope = gradscope.watch(training.run, training.optimizer, log_dir=folder, **settings)
        stack.callback(scope.close)
        training.log = scope.log
        training.end_of_round = scope._recorder.flush  # noqa: SLF001

    return attach


def read_all(training: Training, stack: ExitStack) -> None:
    del stack
    training.extra = lambda: [gradient.sum() for gradient in gradients(training.model)]


def foreach_norm(training: Training, stack: ExitStack) -> None:
    del stack
    training.extra = lambda: torch._foreach_norm(list(gradients(training.model)))  # noqa: SLF001


def gradients(model: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in model.parameters() if p.grad is not None)


def histograms(training: Training, stack: ExitStack) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    writer: Any = SummaryWriter(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.callback(writer.close)

    def add() -> None:
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                writer.add_histogram(name, parameter.grad, training.steps)

    training.extra = add


def lightning_norms(training: Training, stack: ExitStack) -> None:
    from lightning.pytorch.utilities import grad_norm  # noqa: PLC0415

    del stack
    training.extra = lambda: grad_norm(training.model, norm_type=2)


def wandb_watch(training: Training, stack: ExitStack) -> None:
    import wandb  # noqa: PLC0415

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    settings = wandb.Settings(silent=True)
    run = stack.enter_context(wandb.init(mode="offline", dir=folder, settings=settings))
    run.watch(training.model, log="gradients", log_freq=1)
    training.extra = lambda: run.log({}, step=training.steps)


# By name: the package that has to be installed, and what is done with it.
PEERS: dict[str, tuple[str, Attach]] = {
    "one read of all gradients": ("torch", read_all),
    "torch._foreach_norm": ("torch", foreach_norm),
    "Lightning grad_norm": ("lightning", lightning_norms),
    "TensorBoard add_histogram per gradient": ("tensorboard", histograms),
    "wandb.watch gradients": ("wandb", wandb_watch),
}
WATCHES = (
    Setting("default, of all of the first 500 steps", watch(), of_all=True),
    Setting('every=1, level="parameters"', watch(every=1, level="parameters")),
    Setting("every=1", watch(every=1)),
    Setting('every=1, level="deep"', watch(every=1, level="deep")),
    Setting("not recorded (every=1000)", watch(every=1000)),
    Setting("compiled, not recorded", watch(every=1000), compiled=True),
)


def rounds(bare: Training, other: Training, seconds: float) -> list[float]:
    """The ratio of each round, in which neither is always the first."""
    bare.round(2), other.round(2)
    # Rounds of half a second, so that a pause of the machine's falls into few.
    steps = max(1, round(0.5 / bare.round(1)))
    bare.round(steps), other.round(steps)
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < _FEWEST_ROUNDS or time.perf_counter() - began < seconds:
        if len(ratios) % 2:
            base, cost = bare.round(steps), other.round(steps)
        else:
            cost, base = other.round(steps), bare.round(steps)
        ratios.append(cost / base)
    return ratios


def of_all(bare: Training, other: Training, steps: int) -> float:
    """The ratio of the sums, over so many steps from the first on."""
    bare.round(2)
    base = cost = 0.0
    for _ in range(steps):
        base += bare.round(1)
        cost += other.round(1)
    return cost / base


def main() -> None:
    parser = argparse.ArgumentParser(description="What watching costs.")
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help=", ".join(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each comparison, at least")
    parser.add_argument("--only", default="", help="settings with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name in options.subjects:
        for setting in _settings(options.only):
            ratio, how = _measured(SUBJECTS[name], setting, options.seconds)
            title = SUBJECTS[name].title
            print(f"{title:16} {setting.name:40} {ratio:6.3f}  ({how})", flush=True)


def _settings(only: str) -> Iterator[Setting]:
    there = importlib.util.find_spec
    peers = (Setting(name, to) for name, (package, to) in PEERS.items() if there(package))
    return (setting for setting in (*peers, *WATCHES) if only in setting.name)


def _measured(subject: Subject, setting: Setting, seconds: float) -> tuple[float, str]:
    bare, other = (Training(subject, compiled=setting.compiled) for _ in range(2))
    with ExitStack() as stack:
        setting.attach(other, stack)
        if setting.of_all:
            return of_all(bare, other, _DEFAULT_STEPS), f"{_DEFAULT_STEPS} steps"
        ratios = rounds(bare, other, seconds)
    return statistics.median(
        ratios
    ), f"{len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f}"


if __name__ == "__main__":
    main()
