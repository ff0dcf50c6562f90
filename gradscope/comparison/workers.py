"""Tasks run here, or on the workers of an executor; what a dying worker costs."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

from gradscope.comparison.cells import Outcome, Task, cells, run


def here(tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Cell by cell, in this process."""
    for task in tasks:
        yield from cells(task)


def there(tasks: Sequence[Task], executor: Executor) -> Iterator[Outcome]:
    """On workers. Those whose worker died are tried again, each in a process of its own."""
    futures = {executor.submit(run, task): task for task in tasks}
    broken = []
    try:
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield future.result()
            elif _is_a_death(error):
                broken.append(futures[future])
            else:
                error.add_note("raised in gradscope.compare, by a worker of the executor")
                raise error
    finally:
        for future in futures:
            future.cancel()
    for task in broken:
        yield from _alone(task)


def _is_a_death(error: BaseException) -> bool:
    """Of a worker; Dask and others have errors of their own for it."""
    return (
        isinstance(error, (BrokenProcessPool, ConnectionError)) or "Killed" in type(error).__name__
    )


def _alone(task: Task) -> Iterator[Outcome]:
    """Cell by cell, each in a new process, so that one that kills its process costs itself."""
    for name in task.names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                yield pool.submit(run, replace(task, names=(name,))).result()
            except BrokenProcessPool:
                yield Outcome(notes={f"{name}, seed {task.seed}: its worker died, twice": None})
