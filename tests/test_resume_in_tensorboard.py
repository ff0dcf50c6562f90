"""TensorBoard, running since before the kill, goes on showing a run that is resumed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gradscope
from gradscope.log import framing
from gradscope.log.writer import run_files
from tests.test_tensorboard import Server


@pytest.fixture(params=["true", "false"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    train(tmp_path / "run", 0, 3)
    made = Server(tmp_path, request.param)
    yield made
    made.stop()


def train(folder: Path, first: int, steps: int) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradscope.watch(model, optimizer, log_dir=folder, every=1, resume=True) as scope:
        for step in range(first, first + steps):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            scope.log(loss=float(step))


def test_steps_go_on_behind_a_torn_record(server: Server) -> None:
    def points(number: int) -> list[tuple[int, float]]:
        answer = server.ask(
            "scalars/scalars",
            until=lambda known: len(known) >= number,
            run="run",
            tag="training/loss",
        )
        return [(step, value) for _, step, value in answer]

    folder = server.log_dir / "run"
    assert points(3) == [(step, step) for step in range(3)]
    (file,) = run_files(folder)
    with file.open("ab") as torn:
        torn.write(framing.frame(b"of a step that was never written whole")[:30])
    train(folder, 3, 4)
    assert points(7) == [(step, step) for step in range(7)]
    run = gradscope.load(folder)
    assert list(run.steps) == list(range(7))
    assert run.meta["resumed"] == [3]
