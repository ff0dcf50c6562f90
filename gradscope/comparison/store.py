"""Where the cells of a comparison are kept as they come, to go on after an interruption."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gradscope.capture.outputs import tensors
from gradscope.comparison.cells import Task
from gradscope.comparison.result import Cell, Name, as_json, from_json
from gradscope.errors import ConfigError


class Store:
    """The cells of a comparison, one per line of `cells.jsonl`, kept as they come."""

    def __init__(self, log_dir: str | Path | None, tasks: Sequence[Task], layers: Any) -> None:
        self._cells: dict[tuple[Name, int], Cell] = {}
        self._path: Path | None = None
        if log_dir is None:
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "cells.jsonl"
        header = {"comparison": _fingerprint(tasks[0], layers)}
        if self._path.exists():
            self._resume(header)
        else:
            self._path.write_text(json.dumps(header) + "\n")

    def _resume(self, header: Mapping[str, str]) -> None:
        assert self._path is not None  # noqa: S101  (only called with one)
        first, *lines = self._path.read_text().splitlines() or [""]
        if first != json.dumps(header):
            message = (
                f"log_dir={str(self._path.parent)!r} holds the cells of another comparison "
                "(another model, batch or train_steps); give another folder"
            )
            raise ConfigError(message)
        for line in lines:
            # A kill may cut the last one.
            if line.endswith("}"):
                cell = from_json(json.loads(line))
                self._cells[cell.name, cell.seed] = cell

    def known(self, tasks: Sequence[Task]) -> list[Cell]:
        """What is already there of them; the folder may hold other cells of the comparison."""
        asked = [(name, task.seed) for task in tasks for name in task.names]
        return [self._cells[one] for one in asked if one in self._cells]

    def without_known(self, task: Task) -> Task:
        """What is left to do of it."""
        names = tuple(n for n in task.names if (n, task.seed) not in self._cells)
        return replace(task, names=names)

    def add(self, new: Iterable[Cell]) -> None:
        """Append them to the file."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            for cell in new:
                file.write(json.dumps(as_json(cell)) + "\n")


def _fingerprint(task: Task, layers: Any) -> str:
    """Of what a cell depends on, functions of the user's aside."""
    subject = task.subject
    made = hashlib.sha256(repr((layers, task.train_steps, task.threads)).encode())
    values = [subject.batch]
    if isinstance(subject.model, nn.Module):
        values.append(subject.model.state_dict())
    for tensor in tensors(values):
        made.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        made.update(tensor.detach().cpu().double().numpy().tobytes())
    return made.hexdigest()
