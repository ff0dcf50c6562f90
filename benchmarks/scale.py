"""What a long run takes: time to load and to judge, bytes of log, memory while it trains.

From the root of the repository: `python -m benchmarks.scale [memory] [speed] [step] [run]`. Each
number stands beside its limit.
"""

import argparse
import gc
import os
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock
from weakref import WeakMethod

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradscope
from gradscope.analysis.analyzer import analyze
from gradscope.capture import handover, meter
from gradscope.capture.cadence import Cadence
from gradscope.capture.config import CaptureConfig
from gradscope.capture.entities import Roster
from gradscope.capture.guard import Guard
from gradscope.capture.handover import Handover
from gradscope.capture.meter import Meter
from gradscope.capture.pulses import Pulses
from gradscope.capture.recorder import Recorder
from gradscope.capture.selection import Selection
from gradscope.capture.statistics import LOWEST_OCTAVE, OCTAVES
from gradscope.log.reader import load, load_part
from gradscope.log.writer import RunWriter
from gradscope.quantities import CATALOGUE, TableName
from gradscope.record import CountArray, Entity

Float32 = np.typing.NDArray[np.float32]


def main() -> None:
    measures: dict[str, Callable[[], None]] = {
        # In a process that has freed nothing large yet.
        "memory": memory,
        "speed": speed,
        "step": bytes_per_step,
        "run": bytes_per_run,
    }
    parser = argparse.ArgumentParser(description="What a long run takes.")
    parser.add_argument("measures", nargs="*", default=list(measures), help=", ".join(measures))
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name in parser.parse_args().measures:
        measures[name]()


def show(what: str, found: float, unit: str, limit: float | None = None) -> None:
    verdict = ""
    if limit is not None:
        verdict = f"limit {limit:g} {unit:8} {'holds' if found <= limit else 'DOES NOT HOLD'}"
    print(f"{what:70} {found:9.2f} {unit:8} {verdict}".rstrip(), flush=True)


def timed(action: Callable[[], object]) -> tuple[object, float, float]:
    """What came of it, the seconds that passed, and those that were computed."""
    gc.collect()
    start, computed = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - start, time.process_time() - computed


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class Records:
    """Records of a model of so many parameters and modules, with other numbers at each step."""

    COLUMNS = ("step", "loss", "loss_nonfinite", "learning_rate")

    def __init__(self, parameters: int, modules: int, *, histograms: bool = True) -> None:
        self._generator = np.random.default_rng(0)
        self._entities: dict[TableName, list[Entity]] = {
            "parameters": [
                Entity(f"layers.{i}.weight", "parameter", (8, 8), 64, i, "weight", "Linear")
                for i in range(parameters)
            ],
            "modules": [
                Entity(f"layers.{i}", "module", (4, 8), 32, i, "linear", "Linear")
                for i in range(modules)
            ],
            "signals": [Entity("input", "signal", (4, 8), 32, 0, "signal", "input")],
        }
        self._blocks = {
            table: self._numbers(table, len(known)) for table, known in self._entities.items()
        }
        self._counts: CountArray | None = None
        if histograms:
            # Twelve octaves hold nearly all of a gradient that is about normal.
            self._counts = np.zeros((parameters, OCTAVES), np.uint32)
            self._counts[:, 90:102] = self._generator.integers(1, 900, (parameters, 12))

    def _numbers(self, table: TableName, entities: int) -> Float32:
        return self._generator.lognormal(0, 1, (len(CATALOGUE[table]), entities)).astype(np.float32)

    def begin(self, writer: RunWriter) -> None:
        """Write who they are."""
        for table, known in self._entities.items():
            writer.entities(table, known)

    def write(self, writer: RunWriter, step: int, *, pulse: bool) -> None:
        """Write a step."""
        # As a whole a little up and down: nothing is judged to be constant.
        factor = np.float32(1 + 0.1 * np.sin(step))
        tables = {table: block * factor for table, block in self._blocks.items()}
        rows = np.array([[step, 2.3 / (1 + step / 1_000) + 0.1 * np.sin(step), 0.0, 0.1]])
        counts = None if self._counts is None else (LOWEST_OCTAVE, {"grad": self._counts})
        writer.step(
            step,
            tables,
            {"training/loss": 1.0},
            (self.COLUMNS, rows) if pulse else None,
            counts,  # type: ignore[arg-type]
        )


def speed() -> None:
    """Loading and judging 10 000 recorded steps."""
    for parameters, modules, what in ((150, 150, "300 entities"), (300, 300, "2 × 300 entities")):
        with tempfile.TemporaryDirectory() as folder:
            writer = RunWriter(Path(folder), {"loss_is_progress": True})
            records = Records(parameters, modules)
            records.begin(writer)

            def write(records: Records = records, writer: RunWriter = writer) -> None:
                for step in range(10_000):
                    records.write(writer, step, pulse=True)

            _, wrote, _ = timed(write)
            writer.close()
            run, loaded, computed = timed(lambda folder=folder: load(folder))  # type: ignore[misc]
            assert isinstance(run, gradscope.Run)  # noqa: S101
            _, analyzed, judged = timed(lambda run=run: analyze(run))  # type: ignore[misc]
            # The limit is that of 300; twice as many show how it grows.
            is_limited = parameters + modules == 300
            of = f"10 000 recorded steps × {what}"
            show(f"{of}, write a step", wrote / 10, "ms")
            show(f"{of}, on disk", size(Path(folder)) / 1e6, "MB")
            show(f"{of}, load", loaded, "s", 3 if is_limited else None)
            show(f"{of}, load, computing", computed, "s")
            show(f"{of}, analysis", analyzed, "s", 2 if is_limited else None)
            show(f"{of}, analysis, computing", judged, "s")


def bytes_per_step() -> None:
    """What a recorded step of GPT-2 takes of the disk."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    words = torch.randint(50_257, (1, 32))
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        with gradscope.watch(model, optimizer, log_dir=folder, every=1) as scope:
            for _ in range(4):
                model(input_ids=words, labels=words).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scope._settle()  # noqa: SLF001
                scope._recorder.flush()  # noqa: SLF001
                sizes.append(scope._recorder.record_bytes)  # noqa: SLF001
        run = load(folder)
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    entities = f"{len(run.parameters.entities)} parameters, {len(run.modules.entities)} modules"
    per_step = max(np.diff([0, *sizes])) / 1e3
    show(f"GPT-2 {counted:.0f}M ({entities}), full, a step", per_step, "kB", 32)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """The seconds that have passed."""
        return self.now

    monotonic = perf_counter


class Host:
    """Stands for who is told that the log failed."""

    def failed(self, reason: str) -> None:
        """Writing has failed."""
        raise RuntimeError(reason)


STEPS = 1_000_000


def bytes_per_run() -> None:
    """A run of 1 000 000 steps under the budget, written as watch would; only time is made up."""
    for seconds, cost, names in ((0.1, 0.02, 0), (0.1, 0.02, 5), (1.0, 0.02, 0)):
        with tempfile.TemporaryDirectory() as folder:
            recorded, of_records = million(Path(folder), seconds, cost, names)
            what = f"1 000 000 steps of {seconds:g} s, a record {1e3 * cost:g} ms"
            if names:
                # As many as a scaler and clipping have.
                what += f", {names} further scalars"
            show(what, size(Path(folder)) / 1e6, "MB", 200)
            show(f"    of it {recorded} records of GPT-2 124M", of_records / 1e6, "MB")
            if seconds == 0.1 and not names:
                memory_of_part(Path(folder))


def million(folder: Path, seconds: float, cost: float, names: int) -> tuple[int, int]:
    """Steps of so many seconds with loss, rate and further scalars; records as GPT-2 has them."""
    clock, host = Clock(), Host()
    guard = Guard(lambda _: None)
    model = nn.Linear(1, 1)
    roster, pulses = Roster(model, CaptureConfig(every=None, level="full")), Pulses(guard)
    hands = Handover(roster, Selection(roster, guard), pulses)
    writer = RunWriter(folder, {"loss_is_progress": True})
    records = Records(148, 138)
    records.begin(writer)
    spent, recorded = 0.0, 0
    own = {f"scalar_{i}": 0.5 for i in range(names)}
    of_records = 0

    def write(writer: RunWriter, step: int) -> None:
        nonlocal of_records
        before = writer.size
        records.write(writer, step, pulse=False)
        of_records += writer.size - before

    with (
        mock.patch.object(meter, "time", clock),
        mock.patch.object(handover, "time", clock),
    ):
        cadence = Cadence(None, 0.01, Meter(lambda: spent), lambda: of_records)
        recorder = Recorder(writer, WeakMethod(host.failed))
        hands.recorder = recorder
        for step in range(STEPS):
            due = cadence.due(step)
            pulses.begin(step)
            pulses.log(2.3, None, dict(own))
            pulses.rate(1e-4)
            clock.now += seconds
            if due:
                clock.now, spent, recorded = clock.now + cost, spent + cost, recorded + 1
                recorder.call(lambda writer, step=step: write(writer, step))  # type: ignore[misc]
                recorder.flush()
            pulses.end()
            if due:
                hands.flush()
            else:
                hands.step_closed(None)
            cadence.step_closed(recorded=due)
            if due:
                cadence.agree(cadence.propose(step))
        hands.flush()
        recorder.close()
    return recorded, of_records


def memory_of_part(folder: Path) -> None:
    """What is taken for a moment where TensorBoard gets its findings, of a run of that length."""
    gc.collect()
    tracemalloc.start()
    analyze(load_part(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    show("    host memory for its findings in TensorBoard, at most", peak / 1e6, "MB", 64)


def resident() -> int:
    """The process's memory in bytes, where the system has /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory() -> None:
    """Host memory over 10 000 steps of a tiny model, all of them recorded."""
    for log_dir in (True, False):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x, y = torch.randn(16, 8), torch.arange(16) % 4
        with tempfile.TemporaryDirectory() as folder:
            scope = gradscope.watch(
                model, optimizer, log_dir=Path(folder) / "run" if log_dir else None, every=1
            )

            def train(scope: gradscope.Scope = scope, steps: int = 0) -> None:
                for _ in range(steps):
                    loss = F.cross_entropy(model(x), y)  # noqa: B023
                    loss.backward()
                    optimizer.step()  # noqa: B023
                    optimizer.zero_grad()  # noqa: B023
                    scope.log(loss=loss)
                scope._recorder.flush()  # noqa: SLF001
                gc.collect()

            train(steps=2_000)
            before = resident()
            train(steps=8_000)
            grown = resident() - before
            of = "with" if log_dir else "without"
            show(f"resident memory, step 2 000 to 10 000, {of} log_dir", grown / 1e6, "MB", 64)
            with suppress(OSError):
                scope.close()


if __name__ == "__main__":
    main()
