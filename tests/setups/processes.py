"""Runs scenarios in several real processes that form a process group, and brings back the results.

Modules of scenarios have a function `scenarios` of the number of processes: name → function of a
`Place` that returns what pickles. All processes go through all of them, in order; what a process
raises is its result.
"""

import contextlib
import fcntl
import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gradscope.reporters import tensorboard

ROOT = Path(__file__).parents[2]

# A process that waits in vain gives up after this many seconds.
_PATIENCE = 30


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, and where it may write: a folder per scenario."""

    rank: int
    size: int
    folder: Path
    device: str


Scenario = Callable[[Place], Any]


@dataclass
class Outcome:
    """What a scenario returned in one process, or its traceback, and gradscope's warnings."""

    result: Any = None
    error: str = "it did not get that far"
    warned: list[str] = field(default_factory=list)


def launch(
    modules: Sequence[str], size: int, folder: Path, *, device: str = "cpu", timeout: float = 200.0
) -> dict[str, list[Outcome]]:
    """Scenario → what it led to in each process. No process outlives the call."""
    folder.mkdir(parents=True, exist_ok=True)
    # Workers of pytest that want the same wait for the one that was first.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _run(modules, size, folder, device, timeout)
            (folder / "done").touch()
    names = _scenarios(modules, size)
    return {name: [_outcome(folder, name, rank) for rank in range(size)] for name in names}


def _scenarios(modules: Sequence[str], size: int) -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}
    for module in modules:
        found |= importlib.import_module(module).scenarios(size)
    return found


# Size and device → scenario → the outcomes, and the folder where a folder of each scenario is.
Outcomes = Callable[[int, str], tuple[dict[str, list[Outcome]], Path]]


def launcher(modules: Sequence[str], folders: pytest.TempPathFactory) -> Outcomes:
    """What launches the modules' scenarios once per number of processes and device."""
    base = folders.getbasetemp()
    # With several workers of pytest each has a folder in one that they share.
    shared = base.parent if base.name.startswith("popen-") else base

    def outcomes(size: int, device: str) -> tuple[dict[str, list[Outcome]], Path]:
        folder = shared / f"{modules[0]}-{size}-{device}"
        return launch(modules, size, folder, device=device), folder

    return outcomes


def devices(size: int, *marks: pytest.MarkDecorator) -> list[Any]:
    """The CPU, and as many GPUs as there are processes where there are so many."""
    there = torch.cuda.device_count()
    few = pytest.mark.skipif(there < size, reason=f"NCCL needs {size} GPUs; there are {there}")
    return [
        pytest.param(size, "cpu", id=f"{size}", marks=marks),
        pytest.param(size, "cuda", id=f"{size}-gpu", marks=[*marks, pytest.mark.gpu, few]),
    ]


EVERYWHERE = [*devices(2), *devices(4)]


def _run(modules: Sequence[str], size: int, folder: Path, device: str, timeout: float) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [",".join(modules), str(size), str(folder), device]
    # In a session of their own: they are stopped together.
    with subprocess.Popen(
        [sys.executable, "-m", "tests.setups.processes", *arguments],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _fork(modules: Sequence[str], size: int, folder: Path, device: str) -> None:
    """The processes, forked: what each would import takes longer than what it does."""
    importlib.import_module("torch._dynamo")

    _scenarios(modules, size)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                with (folder / f"output.{rank}").open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                _serve(modules, rank, size, folder, device)
                status = 0
            except BaseException:  # noqa: BLE001  (said where the outcomes are read)
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def _outcome(folder: Path, name: str, rank: int) -> Outcome:
    path = folder / f"{name}.{rank}.pickle"
    if path.exists():
        outcome: Outcome = pickle.loads(path.read_bytes())  # noqa: S301  (written by _serve)
        return outcome
    output = (folder / f"output.{rank}").read_text(encoding="utf-8", errors="replace")
    return Outcome(error=f"it did not get that far; the process said:\n{output[-3000:]}")


def _serve(modules: Sequence[str], rank: int, size: int, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_PATIENCE),
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    only = os.environ.get("SCENARIOS", "").split()
    for name, scenario in _scenarios(modules, size).items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        outcome = Outcome(error="")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with mock.patch.object(tensorboard, "pictures", return_value={}):
                    outcome.result = scenario(Place(rank, size, folder / name, device))
            except Exception:  # noqa: BLE001  (it is the result)
                outcome.error = traceback.format_exc()
        outcome.warned = [str(w.message) for w in caught if "gradscope" in str(w.message)]
        partial = folder / f"{name}.{rank}.part"
        partial.write_bytes(pickle.dumps(outcome))
        partial.rename(folder / f"{name}.{rank}.pickle")
    dist.destroy_process_group()


if __name__ == "__main__":
    # As a module of its own name: what is pickled here is read elsewhere.
    importlib.import_module("tests.setups.processes")._fork(
        sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    )
