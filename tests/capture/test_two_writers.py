"""A run that a process writes to is not resumed by another."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope.capture import folders
from gradscope.capture.scope import Scope, watch
from gradscope.errors import LogError
from gradscope.log.reader import load
from gradscope.log.writer import run_files
from tests.capture.trainings import mlp_model, sgd, vectors

# Resumes the run, and writes to it until it is killed or told to end.
WATCHES = """
import sys
from gradscope.capture.scope import watch
from tests.capture.trainings import mlp_model
scope = watch(mlp_model(), log_dir=sys.argv[1], every=1, resume=True)
"""
# The same without importing torch, which takes longer than all the rest.
WRITES = """
import sys
from pathlib import Path
from gradscope.log.reader import continuation
from gradscope.log.writer import RunWriter
writer = RunWriter(Path(sys.argv[1]), {}, continuation(Path(sys.argv[1])))
"""
WAITS = """
print("ready", flush=True)
sys.stdin.read()
"""
# A worker, as a data loader has them, that outlives its parent.
FORKS = """
import os, time
worker = os.fork()
if not worker:
    time.sleep(120)
print(worker, flush=True)
"""


@contextmanager
def other_process(program: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, that has come as far as it comes until it is told to end."""
    command = [sys.executable, "-c", program + WAITS, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def train(folder: Path, steps: int = 2) -> None:
    torch.manual_seed(0)
    model = mlp_model()
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=folder, every=1, resume=True) as scope:
        for _ in range(steps):
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scope.log(loss=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a run of two steps."""
    train(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("program", [WATCHES, WRITES], ids=["watches", "writes"])
def test_the_second_is_told(program: str, folder: Path) -> None:
    with other_process(program, folder) as process:
        assert said(process) == "ready"
        files = run_files(folder)
        assert len(files) == 2
        model = mlp_model()
        with pytest.raises(LogError) as caught:
            watch(model, log_dir=folder, resume=True)
        assert repr(str(folder)) in str(caught.value)
        assert "another process writes to the run" in str(caught.value)
        # It leaves nothing behind, in the folder or on the model.
        assert run_files(folder) == files
        assert not any(module._forward_pre_hooks for module in model.modules())
        # A run of its own is no harm.
        with pytest.warns(UserWarning, match="holds a run already"):
            watch(model, log_dir=folder).close()
        # Neither is looking at it.
        assert list(load(folder).steps) == [0, 1]
        process.communicate()
    train(folder)
    assert list(load(folder).steps) == [0, 1, 2, 3]


def test_one_that_comes_while_the_run_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the other had begun after the first look."""
    monkeypatch.setattr(folders, "refuse_if_held", lambda *_: None)
    with other_process(WRITES, folder) as process:
        assert said(process) == "ready"
        files = run_files(folder)
        with pytest.raises(LogError, match="another process writes to the run"):
            watch(mlp_model(), log_dir=folder, resume=True)
        assert run_files(folder) == files


def test_killed_process_leaves_no_lock(folder: Path) -> None:
    with other_process(WRITES, folder) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGKILL)
        process.wait()
        train(folder)
    assert list(load(folder).steps) == [0, 1, 2, 3]


def test_worker_that_outlives_a_killed_process_keeps_no_lock(folder: Path) -> None:
    with other_process(WRITES + FORKS, folder) as process:
        worker = int(said(process))
        try:
            assert said(process) == "ready"
            with pytest.raises(LogError):
                watch(mlp_model(), log_dir=folder, resume=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(worker, 0)
            train(folder)
        finally:
            os.kill(worker, signal.SIGKILL)
    assert list(load(folder).steps) == [0, 1, 2, 3]


def test_watch_that_was_not_closed_does_not_keep_its_own_process_out(folder: Path) -> None:
    def begin() -> Scope:
        return watch(mlp_model(), log_dir=folder, resume=True)

    left = begin()
    train(folder)
    left.close()
    assert list(load(folder).steps) == [0, 1, 2, 3]


def test_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(folder)
    assert list(load(folder).steps) == [0, 1, 2, 3]


def test_watched_training_in_a_forked_child_can_not_resume_its_parents_run(folder: Path) -> None:
    model: nn.Module = mlp_model()
    with watch(model, log_dir=folder, resume=True):
        child = os.fork()
        if not child:
            try:
                watch(mlp_model(), log_dir=folder, resume=True)
            except LogError:
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
