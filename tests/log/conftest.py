"""A small run, written record by record."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.log.writer import RunWriter, run_files
from gradscope.quantities import CATALOGUE, Magnitudes, TableName
from gradscope.record import CountArray, Entity

LoadedTable = NDArray[np.float32]


def entity(name: str, depth: int = 0) -> Entity:
    return Entity(name, "parameter", (2, 3), 6, depth, "weight", "Linear")


def values(seed: int, table: TableName, entities: int) -> LoadedTable:
    """Numbers that tell steps, quantities and entities apart."""
    quantities = len(CATALOGUE[table])
    numbers = np.arange(quantities * entities, dtype=np.float32) + 1000 * seed
    return numbers.reshape(quantities, entities)


LOWEST = -2


def counts(seed: int, entities: int) -> CountArray:
    """Counts that tell steps, bins and entities apart."""
    return np.arange(4 * entities, dtype=np.uint32).reshape(entities, 4) + np.uint32(100 * seed)


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """Four steps; a further entity of each table comes with the third."""
    folder = tmp_path / "small"
    folder.mkdir()
    writer = RunWriter(folder, {"model": "Small"})
    for step in range(4):
        count = 1 + step // 2
        if step % 2 == 0:
            for table in CATALOGUE:
                writer.entities(table, [entity(f"{table}.{count}", count)])
        tables = {table: values(step, table, count) for table in CATALOGUE}
        counted: dict[Magnitudes, CountArray] = {"grad": counts(step, count)}
        pulse = np.array([[float(step), step / 10]])
        writer.step(
            step, tables, {"training/loss": step / 10}, (["step", "loss"], pulse), (LOWEST, counted)
        )
    writer.problem(3, "part", "something")
    writer.close()
    return folder


@pytest.fixture
def event_file(small_run: Path) -> Path:
    (path,) = run_files(small_run)
    return path


@pytest.fixture
def record_ends() -> Callable[[bytes], list[int]]:
    """Where the records of a file end, by the lengths alone."""

    def find(content: bytes) -> list[int]:
        ends, at = [], 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            # Length, its checksum, the data, its checksum.
            at += 8 + 4 + length + 4
            ends.append(at)
        return ends

    return find
