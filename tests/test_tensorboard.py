"""TensorBoard, started as a process, shows a run's scalars and text, with both of its loaders."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradscope

_STARTS_WITHIN = 60.0


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradscope.watch(model, optimizer, log_dir=folder / "run", every=1) as scope:
        for step in range(30):
            loss = model(torch.randn(8, 4)).square().mean()
            # The 20th gradient is broken.
            (loss if step != 20 else loss * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss, temperature=step / 10)
    return folder


@pytest.fixture(scope="module", params=["true", "false"])
def ask(log_dir: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)),
        *("--host", "127.0.0.1", "--port", str(port), "--load_fast", request.param),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(route: str) -> Any:
        url = f"http://127.0.0.1:{port}/data/plugin/{route}"
        deadline = time.monotonic() + _STARTS_WITHIN
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    content = json.load(answer)
                # Until it has read the files it answers with nothing.
                if content:
                    return content
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, "TensorBoard did not start"
            assert time.monotonic() < deadline, f"no answer from {route}"
            time.sleep(0.2)

    yield get
    server.terminate()
    server.wait()


def test_scalars_and_text(ask: Callable[[str], Any]) -> None:
    tags = ask("scalars/tags")["run"]
    assert {"training/loss", "gradient/global_norm", "user/temperature"} <= set(tags)
    assert len(tags) <= 15
    points = ask("scalars/scalars?run=run&tag=gradient/global_norm")
    norms = {step: value for _, step, value in points}
    assert sorted(norms) == list(range(30))
    # What is left beside NaN is not the gradient's norm.
    assert norms[20] == "NaN"
    assert isinstance(norms[19], float)
    assert norms[19] > 0
    temperatures = ask("scalars/scalars?run=run&tag=user/temperature")
    assert [value for _, _, value in temperatures] == pytest.approx([i / 10 for i in range(30)])
    assert ask("text/tags") == {"run": ["gradscope/findings"]}
    (text,) = ask("text/text?run=run&tag=gradscope/findings")
    assert "GS503 non-finite-gradient" in text["text"]


def test_the_run_says_the_same(log_dir: Path) -> None:
    run = gradscope.load(log_dir / "run")
    assert run.scalars["nonfinite"].tolist() == [float(step >= 20) for step in range(30)]
    assert run.scalars["loss_nonfinite"].tolist() == [float(step > 20) for step in range(30)]
    assert [bool(norm > 0) for norm in run.scalars["grad_norm"]] == [s < 20 for s in range(30)]
