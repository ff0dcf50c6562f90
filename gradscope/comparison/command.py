"""`gradscope compare`: what the command line asks of `gradscope.compare`."""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gradscope.comparison.grid import compare
from gradscope.errors import ConfigError

# As a shell says it of a command that Ctrl-C ended.
_INTERRUPTED = 130


def run_compare(asked: argparse.Namespace) -> int:
    """Compare, print, write; the exit status is 130 where it was interrupted."""
    model = _named("MODEL", asked.model)
    batch = _named("--data", asked.data)
    if callable(batch):
        batch = batch()
    with ExitStack() as afterwards:
        pool = None
        if asked.workers > 0:
            pool = ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn"))
            afterwards.enter_context(pool)
        bar = afterwards.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = bar.add_task("comparing", total=None)
        comparison = compare(
            model,
            batch,
            _loss(asked.loss),
            initializations=_list(asked.initializations),
            activations=_list(asked.activations),
            mitigations=_list(asked.mitigations),
            seeds=asked.seeds,
            train_steps=asked.train_steps,
            executor=pool,
            log_dir=asked.log_dir,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    comparison.print()
    for path in asked.output:
        print(comparison.write(path))  # noqa: T201
    return 0 if comparison.complete else _INTERRUPTED


def _loss(place: str | None) -> Any:
    """A function, or an instance where the class is named, as torch.nn:CrossEntropyLoss."""
    found = None if place is None else _named("--loss", place)
    return found() if isinstance(found, type) else found


def _list(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _named(argument: str, place: str) -> Any:
    """What stands in a module under a name, the working directory among the places to look."""
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        message = f"{argument}={place!r} must be package.module:name"
        raise ConfigError(message)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        message = f"{argument}={place!r} can't be found: {error}"
        raise ConfigError(message) from error
    return found
