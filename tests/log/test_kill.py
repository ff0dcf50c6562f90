"""A process that is killed leaves all but the last two seconds of its training."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gradscope.log.reader import load

PROGRAM = """
import json, os, sys, time
import torch
import torch._dynamo
from torch import nn
from gradscope.capture.scope import watch

def train(folder, every, fast_steps, pause, where):
    times = open(folder + ".times", "w", buffering=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scope = watch(model, optimizer, log_dir=folder, every=every or None)
    for number in range(100_000):
        seconds = pause if number >= fast_steps else 0.01
        if where == "before":
            time.sleep(seconds)
        loss = model(torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scope.log(loss=float(number))
        print(number, time.monotonic(), file=times)
        if where == "after":
            time.sleep(seconds)

torch.set_num_threads(1)
# Forked, because importing torch, and the compiler that its optimizers want, takes longer than
# the rest.
for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        train(*arguments)
    print(child, flush=True)
for _ in json.loads(sys.argv[1]):
    os.wait()
"""

# What may be lost.
LOSS = 2.0


@dataclass(frozen=True)
class Child:
    """One training: its cadence, and whether and where it becomes slow."""

    every: int
    fast_steps: int = 100_000
    pause: float = 0.01
    where: str = "after"

    def arguments(self, folder: Path) -> list[object]:
        return [str(folder), self.every, self.fast_steps, self.pause, self.where]


CHILDREN = {
    "fast, all recorded": Child(1),
    "fast, few recorded": Child(10_000),
    "fast, default cadence": Child(0),
    "pause after a recorded step": Child(1, 5, 60),
    "pause after an unrecorded step": Child(10_000, 5, 60),
    "pause before a step": Child(1, 5, 60, "before"),
    "slow steps": Child(1, 3, 1.0),
}


@dataclass(frozen=True)
class Death:
    """A child's log, the time of each step it reported, and the time of its death."""

    folder: Path
    times: dict[int, float]
    at: float


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Death]:
    root = tmp_path_factory.mktemp("killed")
    folders = {name: root / str(index) for index, name in enumerate(CHILDREN)}
    arguments = [child.arguments(folders[name]) for name, child in CHILDREN.items()]
    program = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        children = [int(launcher.stdout.readline()) for _ in CHILDREN]
        deaths = {}
        try:
            wait_for_first_step(folders.values())
            # Longer than what may be lost, so that something must be there.
            time.sleep(LOSS + 1.2)
        finally:
            for name, child in zip(CHILDREN, children, strict=True):
                deaths[name] = time.monotonic()
                os.kill(child, signal.SIGKILL)
    return {name: Death(folder, reported(folder), deaths[name]) for name, folder in folders.items()}


def wait_for_first_step(folders: Iterable[Path]) -> None:
    deadline = time.monotonic() + 60
    while not all(reported(folder) for folder in folders):
        assert time.monotonic() < deadline, "a child does not train"
        time.sleep(0.05)


def reported(folder: Path) -> dict[int, float]:
    """Step → when it was done."""
    file = folder.with_suffix(".times")
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    pairs = [line.split() for line in lines if line.endswith("\n")]
    return {int(number): float(at) for number, at in pairs}


@pytest.mark.parametrize("name", CHILDREN)
def test_all_but_the_last_two_seconds_are_there(name: str, killed: dict[str, Death]) -> None:
    death = killed[name]
    due = [number for number, at in death.times.items() if at < death.at - LOSS]
    assert due, "the child did too little for the test to mean anything"
    run = load(death.folder)
    assert set(due) <= {int(step) for step in run.steps}
    losses = dict(zip(run.steps.tolist(), run.scalars["loss"].tolist(), strict=True))
    assert {number: losses[number] for number in due} == {number: float(number) for number in due}
    every = CHILDREN[name].every
    recorded = {n for n in due if (n % every == 0 if every else n < 10)}
    assert recorded <= {int(step) for step in run.recorded_steps}
    rows = [row for row, step in enumerate(run.parameters.steps) if int(step) in recorded]
    assert not np.isnan(run.parameters["grad_norm"][rows]).any()
    assert not np.isnan(run.parameters["update_norm"][rows]).any()
    assert recorded <= {int(step) for step in run.histograms.steps}
    # Sixteen rows of a loss that nothing saturates: most entries of a gradient are not zero.
    assert all(run.histograms.at(index).any() for index in range(len(run.histograms.steps)))
