"""TensorBoard, started as a process with each of its loaders, shows what was written for it."""

import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

import gradscope
from gradscope.capture import display
from gradscope.errors import GradscopeWarning
from gradscope.log.writer import run_files

_STARTS_WITHIN = 60.0
# What is asked for, and the user's own, has limits of its own.
_ON_REQUEST = re.compile("user/|layer/|log10_gradient/|custom_scalars__config__")

Tags: TypeAlias = dict[str, dict[str, Any]]
Gradients: TypeAlias = list[NDArray[np.float64]]

pytestmark = pytest.mark.usefixtures("pictures")


class Server:
    """TensorBoard as a process, asked over HTTP."""

    def __init__(self, log_dir: Path, load_fast: str) -> None:
        self.log_dir = log_dir
        self.load_fast = load_fast
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)),
            *("--host", "127.0.0.1", "--port", str(self._port), "--load_fast", load_fast),
            *("--reload_interval", "1"),
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def fetch(self, route: str, **query: str) -> bytes:
        url = f"http://127.0.0.1:{self._port}/data/plugin/{route}?{urlencode(query)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            content: bytes = answer.read()
        return content

    def ask(self, route: str, until: Callable[[Any], object] = bool, **query: str) -> Any:
        """The answer, once it is as wanted: until it has read the files it knows nothing."""
        deadline = time.monotonic() + _STARTS_WITHIN
        answer: Any = None
        while True:
            try:
                answer = json.loads(self.fetch(route, **query))
                if until(answer):
                    return answer
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self._process.poll() is None, "TensorBoard did not start"
            assert time.monotonic() < deadline, f"from {route} nothing but {answer!r}"
            time.sleep(0.1)

    def scalars(self, run: str, tag: str) -> dict[int, Any]:
        points = self.ask("scalars/scalars", run=run, tag=tag)
        return {step: value for _, step, value in points}


def watch_small(log_dir: Path) -> Gradients:
    """Thirty steps, the 20th gradient broken; the gradients of the first weight."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = model.get_parameter("0.weight")
    gradients = []
    with gradscope.watch(model, optimizer, log_dir=log_dir, every=1) as scope:
        scope.tensorboard(layers="*.weight", histograms="0.weight", margin_charts=True)
        for step in range(30):
            loss = model(torch.randn(8, 4)).square().mean()
            (loss if step != 20 else loss * torch.nan).backward()
            assert weight.grad is not None
            gradients.append(weight.grad.double().numpy().copy())
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss, temperature=step / 10)
    return gradients


def watch_chain(log_dir: Path, layers: int) -> None:
    """A net of so many layers of which everything is seen that can be."""
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4) for _ in range(layers)]
    model = nn.Sequential(*parts[:-1], nn.ReLU(), nn.Tanh(), parts[-1])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    criterion = nn.MSELoss()
    with gradscope.watch(model, optimizer, criterion, log_dir=log_dir, every=1) as scope:
        for _ in range(2):
            # Of so many samples that a unit can count as dead.
            loss = criterion(model(torch.randn(300, 4)), torch.zeros(300, 4))
            loss.backward()
            scope.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss_scale=1024.0)
        nonsense: dict[str, Any] = {"nonsense": "no number"}
        with pytest.warns(GradscopeWarning, match="nonsense"):
            scope.log(**nonsense)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Gradients]:
    folder = tmp_path_factory.mktemp("runs")
    watch_chain(folder / "ten", 10)
    watch_chain(folder / "hundred", 100)
    return folder, watch_small(folder / "run")


@pytest.fixture(scope="module", params=["true", "false"])
def server(runs: tuple[Path, Gradients], request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(runs[0], request.param)
    yield made
    made.stop()


def all_read(tags: Tags) -> bool:
    return {"run", "ten", "hundred"} <= set(tags)


def tags_in_file(log_dir: Path) -> set[str]:
    (path,) = run_files(log_dir)
    return {v.tag for event in EventFileLoader(str(path)).Load() for v in event.summary.value}


def test_scalars(server: Server) -> None:
    tags = set(server.ask("scalars/tags", all_read)["run"])
    assert {"training/loss", "gradient/global_norm", "user/temperature"} <= tags
    norms = server.scalars("run", "gradient/global_norm")
    assert sorted(norms) == list(range(30))
    # What is left beside NaN is not the gradient's norm.
    assert norms[20] == "NaN"
    table = gradscope.load(server.log_dir / "run").parameters
    by_layer = table["grad_norm"].astype(np.float64)
    assert norms[19] == pytest.approx(np.linalg.norm(by_layer[19]), rel=1e-6)
    expected = {
        # Of four parameters: the nearest ranks are the outermost.
        "gradient_norm_by_layer/smallest": by_layer[7].min(),
        "gradient_norm_by_layer/5th_percentile": by_layer[7].min(),
        "gradient_norm_by_layer/median": np.sort(by_layer[7])[1:3].mean(),
        "gradient_norm_by_layer/95th_percentile": by_layer[7].max(),
        "gradient_norm_by_layer/largest": by_layer[7].max(),
        "update_ratio_by_layer/largest": table["update_ratio"][7].max(),
        "layer/0.weight/grad_norm": by_layer[7, table.names.index("0.weight")],
        "layer/2.weight/update_ratio": table["update_ratio"][7, table.names.index("2.weight")],
    }
    for tag, value in expected.items():
        assert server.scalars("run", tag)[7] == pytest.approx(value, rel=1e-5), tag
    temperatures = server.scalars("run", "user/temperature")
    assert list(temperatures.values()) == pytest.approx([i / 10 for i in range(30)])


def test_text(server: Server) -> None:
    tags = server.ask("text/tags", all_read)
    assert set(tags["run"]) == {"gradscope/findings", "gradscope/worst_layers"}
    *_, findings = server.ask("text/text", run="run", tag="gradscope/findings")
    assert "GS503 non-finite-gradient" in findings["text"]
    *_, worst = server.ask("text/text", run="run", tag="gradscope/worst_layers")
    assert "<table>" in worst["text"]
    assert "0.weight" in worst["text"]


def test_images(server: Server) -> None:
    tags = server.ask("images/tags", all_read)
    for run in ("run", "ten", "hundred"):
        assert set(tags[run]) == {"gradscope/heatmap", "gradscope/gradient_by_depth"}
        for tag in tags[run]:
            *_, listed = server.ask("images/images", run=run, tag=tag, sample="0")
            png = server.fetch("images/individualImage", **dict(parse_qsl(listed["query"])))
            image = Image.open(io.BytesIO(png))
            assert image.format == "PNG"
            assert image.width > 800
            assert len(np.unique(np.asarray(image))) > 10
            assert len(png) < 150_000


def test_histograms(server: Server, runs: tuple[Path, Gradients]) -> None:
    assert set(server.ask("histograms/tags")["run"]) == {"log10_gradient/0.weight"}
    shown = server.ask("histograms/histograms", run="run", tag="log10_gradient/0.weight")
    by_step = {step: np.array(buckets) for _, step, buckets in shown}
    # From the 20th step on there is nothing finite to count.
    assert sorted(by_step) == list(range(20))
    for step, buckets in by_step.items():
        logs = np.log10(np.abs(runs[1][step]))
        held = buckets[buckets[:, 2] > 0]
        assert held[0, 0] <= logs.min() < held[0, 1]
        assert held[-1, 0] <= logs.max() < held[-1, 1]
        assert buckets[:, 2].sum() == logs.size
        # An octave wide each, and without a gap.
        assert buckets[:, 1] - buckets[:, 0] == pytest.approx(np.log10(2), abs=1e-5)
        assert buckets[1:, 0] == pytest.approx(buckets[:-1, 1], abs=1e-5)


def test_margin_charts(server: Server) -> None:
    layout = server.ask("custom_scalars/layout")
    (category,) = layout["category"]
    assert [chart["title"].partition(":")[0] for chart in category["chart"]] == [
        "Loss",
        "Gradient norm",
        "Update ratio",
    ]
    (series,) = category["chart"][1]["margin"]["series"]
    scalars = server.ask("scalars/tags", all_read)["run"]
    assert {series["lower"], series["value"], series["upper"]} <= set(scalars)
    found = server.ask("custom_scalars/scalars", run="run", tag="^training/loss$")
    assert len(found["tag_to_events"]["training/loss"]) == 30


def test_forty_tags_are_enough_for_any_model(server: Server) -> None:
    ten, hundred = (tags_in_file(server.log_dir / run) for run in ("ten", "hundred"))
    assert ten == hundred
    assert len(ten) <= 40
    # What there can be is all there.
    assert {"training/loss_scale", "activation/dead_share_mean", "gradscope/problem"} <= ten
    run = tags_in_file(server.log_dir / "run")
    assert len([tag for tag in run if not _ON_REQUEST.match(tag)]) <= 40
    listed: dict[str, set[str]] = {"ten": set(), "hundred": set(), "run": set()}
    for plugin in ("scalars", "text", "images"):
        tags = server.ask(f"{plugin}/tags", all_read)
        for name, found in listed.items():
            found |= set(tags[name])
    assert listed["ten"] == listed["hundred"]
    assert 20 < len(listed["ten"]) <= 40
    # The rest are the records of the run itself.
    assert {tag for tag in ten - listed["ten"] if not tag.startswith("gradscope/")} == set()
    # Nothing of a single layer unless it is asked for.
    assert [tag for tag in ten if _ON_REQUEST.match(tag)] == []
    assert [tag for tag in listed["run"] if tag.startswith("layer/")] != []


def test_new_points_and_pictures_while_training_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "_EXPECTED", 0.0)
    monkeypatch.setattr(display, "_SHARE", 1e9)
    name = f"live-{server.load_fast}"
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)

    def there(tags: Tags) -> bool:
        return name in tags

    def last(step: int) -> Callable[[list[Any]], bool]:
        def reached(points: list[Any]) -> bool:
            # Of an image a mapping, of a scalar a triple.
            return bool(points) and max(_step(point) for point in points) >= step

        return reached

    with gradscope.watch(model, optimizer, log_dir=server.log_dir / name, every=1) as scope:
        train(4)
        server.ask("scalars/tags", there)
        server.ask("images/tags", there)
        server.ask("text/tags", there)
        # The fourth step is not closed yet: that it is there is the recorder's doing.
        loss = {"run": name, "tag": "training/loss"}
        picture = {"run": name, "tag": "gradscope/heatmap", "sample": "0"}
        findings = {"run": name, "tag": "gradscope/findings"}
        server.ask("scalars/scalars", last(3), **loss)
        server.ask("images/images", last(1), **picture)
        train(6)
        server.ask("scalars/scalars", last(9), **loss)
        server.ask("images/images", last(7), **picture)
        server.ask("text/text", last(7), **findings)
    steps = [_step(point) for point in server.ask("images/images", last(9), **picture)]
    assert steps == [0, 1, 3, 7, 9]


def _step(point: Any) -> int:
    return int(point["step"] if isinstance(point, dict) else point[1])


def test_the_run_says_the_same(runs: tuple[Path, Gradients]) -> None:
    run = gradscope.load(runs[0] / "run")
    assert run.scalars["nonfinite"].tolist() == [float(step >= 20) for step in range(30)]
    assert run.scalars["loss_nonfinite"].tolist() == [float(step > 20) for step in range(30)]
    assert [bool(norm > 0) for norm in run.scalars["grad_norm"]] == [s < 20 for s in range(30)]
