"""How long it takes to write and to load 10 000 recorded steps × 300 entities × 26 quantities."""

import tempfile
import time
from pathlib import Path

import numpy as np

from gradscope.analysis.analyzer import analyze
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter
from gradscope.quantities import CATALOGUE
from gradscope.record import Entity

STEPS = 10_000
ENTITIES = 300


def main() -> None:
    generator = np.random.default_rng(0)
    quantities = {name: len(listed) for name, listed in CATALOGUE.items()}
    # 300 parameters and 300 modules: together at least 300 entities with 26 quantities each.
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder), {"loss_is_progress": True})
        for table in ("parameters", "modules"):
            entities = [
                Entity(f"layers.{i}.weight", table, (8, 8), 64, i, "weight", "Linear")
                for i in range(ENTITIES)
            ]
            writer.entities(table, entities)
        blocks = {
            table: generator.random((quantities[table], ENTITIES), dtype=np.float32)
            for table in ("parameters", "modules")
        }
        signals = np.empty((quantities["signals"], 0), np.float32)
        start = time.perf_counter()
        for step in range(STEPS):
            pulse = np.array([[step, 2.3 / (1 + step), 0.1, 0.0]])
            tables = {**blocks, "signals": signals}
            writer.step(
                step,
                tables,  # type: ignore[arg-type]
                {"training/loss": 1.0},
                (["step", "loss", "learning_rate", "nonfinite"], pulse),
            )
        writer.close()
        wrote = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        start = time.perf_counter()
        run = load(folder)
        loaded = time.perf_counter() - start
        start = time.perf_counter()
        report = analyze(run)
        analyzed = time.perf_counter() - start
    values = run.parameters.values.size + run.modules.values.size
    print(f"{STEPS} steps, {values / 1e6:.0f} million values, {size / 1e6:.0f} MB")
    print(f"write {wrote:.2f} s ({1e3 * wrote / STEPS:.3f} ms a step)")
    print(f"load {loaded:.2f} s")
    print(f"analyze {analyzed:.2f} s, {len(report.findings)} findings")


if __name__ == "__main__":
    main()
