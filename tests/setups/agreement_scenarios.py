"""Processes that do not do the same: what `test_distributed_agreement.py` looks at."""

import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradscope.capture import distributed, merge, statistics
from gradscope.capture.cadence import Cadence
from gradscope.capture.hooks import owners
from gradscope.capture.parameters import ParameterReader
from gradscope.capture.scope import Scope
from gradscope.reporters.wording import verdict
from tests.setups.processes import Place, Scenario
from tests.setups.sharded import Sharded, fsdp, net, reductions, sgd, share, watched

STEPS = 12


def _weights(training: Sharded) -> list[Tensor]:
    return [p.to_local().clone() for p in training.model.parameters()]  # type: ignore[attr-defined]


def _unwatched(place: Place) -> list[Tensor]:
    training = fsdp(place)
    training.train(None, STEPS)
    return _weights(training)


def _is_equal(place: Place, training: Sharded) -> bool:
    """Whether the weights are those that training without gradscope leads to, bit for bit."""
    return all(map(torch.equal, _weights(training), _unwatched(place)))


class _Log:
    """At which steps gradscope's reductions came, on this process."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def train(self, training: Sharded, scope: Scope, steps: int = STEPS, **loop: Any) -> None:
        with reductions() as seen:
            for number in range(steps):
                before = len(seen)
                loop.get("before", lambda _: None)(number)
                loss = training.step(number)
                self.steps += [number] * (len(seen) - before)
                scope.log(loss=loss)
                loop.get("after", lambda _: None)(number)


def each_step_once(place: Place) -> Any:
    training, log = fsdp(place), _Log()
    with watched(place, training, every=5) as scope:
        log.train(training, scope)
        problems = scope.run().meta["problems"]
    return log.steps, _is_equal(place, training), problems


def own_clocks_and_losses(place: Place) -> Any:
    """Each proposes another step, at its own pace, with another loss."""
    generator = torch.Generator().manual_seed(place.rank)
    proposed: dict[int, int] = {}

    def propose(self: Cadence, step: int) -> int:
        del self
        proposed[step] = step + int(torch.randint(1, 4, (), generator=generator))
        return proposed[step]

    training, log = fsdp(place), _Log()

    def sleep(number: int) -> None:
        time.sleep(0.01 * ((number + place.rank) % place.size))

    patched = mock.patch.object(Cadence, "propose", propose)
    with patched, watched(place, training, every=None) as scope:
        log.train(training, scope, before=sleep)
        scope.log(loss=float(place.rank))
    return log.steps, _is_equal(place, training), proposed


def first_asks_alone(place: Place) -> Any:
    """run() and report() on rank 0 in mid-training, and the end of it, while the others go on."""
    training, log = fsdp(place), _Log()
    seen: list[int] = []

    def after(number: int) -> None:
        if place.rank == 0:
            seen.append(len(scope.run().parameters.steps))
            if number == 5:
                scope.report()

    scope = watched(place, training)
    log.train(training, scope, after=after)
    dist.barrier()
    if place.rank == 0:
        scope.report()
        scope.close()
    dist.barrier()
    return log.steps, _is_equal(place, training), seen


def _leaves(place: Place, leaver: int) -> Any:
    training, log = fsdp(place), _Log()
    scope = watched(place, training, every=2)

    def after(number: int) -> None:
        if number == 5 and place.rank == leaver:
            scope.close()

    log.train(training, scope, after=after)
    run = scope.run()
    scope.close()
    problems = [p["message"] for p in run.meta["problems"] if p["part"] != "processes"]
    return log.steps, _is_equal(place, training), problems


def first_closes_alone(place: Place) -> Any:
    return _leaves(place, 0)


def last_closes_alone(place: Place) -> Any:
    return _leaves(place, place.size - 1)


def all_close(place: Place) -> Any:
    """In mid-training: hooks go at the step that would have been recorded next."""
    training, log = fsdp(place), _Log()
    scope = watched(place, training, every=2)
    optimizer: Any = training.optimizers[0]

    def after(number: int) -> None:
        if number == 5:
            scope.close()

    log.train(training, scope, after=after)
    left = len(owners(training.model)) + len(optimizer._optimizer_step_pre_hooks)
    return log.steps, _is_equal(place, training), left


def _fails(place: Place, failing: int, what: AbstractContextManager[Any]) -> Any:
    training, log = fsdp(place), _Log()
    scope = watched(place, training)
    patched = []

    def before(number: int) -> None:
        if number == 3 and place.rank == failing:
            what.__enter__()
            patched.append(what)

    try:
        log.train(training, scope, before=before)
    finally:
        for patch in patched:
            patch.__exit__(None, None, None)
    run = scope.run()
    scope.close()
    problems = [p["message"] for p in run.meta["problems"] if p["part"] != "processes"]
    norms = run.parameters["grad_norm"].tolist() if len(run.parameters.steps) else []
    return log.steps, _is_equal(place, training), problems, norms


def _broken(owner: object, name: str) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, side_effect=RuntimeError("out of luck"))


def statistics_fail_on_the_last(place: Place) -> Any:
    return _fails(place, place.size - 1, _broken(statistics, "moments"))


def statistics_fail_on_the_first(place: Place) -> Any:
    return _fails(place, 0, _broken(statistics, "update_products"))


def merging_fails_on_the_last(place: Place) -> Any:
    return _fails(place, place.size - 1, _broken(merge, "_contribution"))


def proposing_fails_on_the_last(place: Place) -> Any:
    return _fails(place, place.size - 1, _broken(Cadence, "propose"))


def histograms_fail_on_the_last(place: Place) -> Any:
    result = _fails(place, place.size - 1, _broken(statistics, "magnitudes"))
    dist.barrier()
    return result


def optimizers_in_turn(place: Place) -> Any:
    """One optimizer at even steps, another at odd ones: never those of the last step."""
    training, log = fsdp(place), _Log()
    held = list(training.model.parameters())
    halves = [sgd(held[:3]), sgd(held[3:])]
    both = Sharded(training.model, halves, training.data)

    def before(number: int) -> None:
        both.optimizers = [halves[number % 2]]

    with watched(place, both, optimizer=halves) as scope:
        log.train(both, scope, before=before)
        run = scope.run()
    return log.steps, [bool(known) for known in _known(run)]


def _known(run: Any) -> list[Any]:
    return [np.isfinite(row).any() for row in run.parameters["grad_norm"]] if len(run.steps) else []


def resumed(place: Place) -> Any:
    """The others do not know at which step the run goes on."""
    training, log = fsdp(place), _Log()
    with watched(place, training, every=2) as scope:
        log.train(training, scope, 4)
    dist.barrier()
    again = fsdp(place)
    with watched(place, again, every=4, resume=True) as scope:
        log.train(again, scope, 7)
    return log.steps


def watched_by_one_alone(place: Place) -> Any:
    """As people do under DDP: where parameters are split it can't work."""
    training, log = fsdp(place), _Log()
    with mock.patch.object(distributed, "_PATIENCE", timedelta(seconds=0.5)):
        if place.rank:
            training.train(None, STEPS)
            return log.steps, _is_equal(place, training), []
        with watched(place, training) as scope:
            log.train(training, scope)
            problems = [p["message"] for p in scope.run().meta["problems"]]
    return log.steps, _is_equal(place, training), problems


def writes_nothing_elsewhere(place: Place) -> Any:
    """Under DDP: what the processes that write nothing have."""
    model = DistributedDataParallel(net().to(place.device))
    training = Sharded(model, [sgd(model.parameters())], lambda number: share(place, number))
    where = Place(place.rank, place.size, place.folder / str(place.rank), place.device)
    read = mock.patch.object(ParameterReader, "weights")
    with reductions() as seen, read if place.rank else nullcontext() as reader:
        scope = watched(where, training)
        training.train(scope)
        scope.tensorboard(layers="*")
        report = scope.report()
        scope.close()
    run = scope.run()
    return {
        "read": 0 if reader is None else reader.call_count,
        "folder": where.folder.exists(),
        "steps": len(run.steps),
        "problems": [p["message"] for p in report.run.meta["problems"]],
        "found": [finding.code for finding in report.findings],
        "said": verdict(report),
        "distributed": run.meta["distributed"],
        "reductions": seen,
        "hooks": len(owners(model.module)),
    }


ALL: list[Scenario] = [
    each_step_once,
    own_clocks_and_losses,
    first_asks_alone,
    first_closes_alone,
    last_closes_alone,
    all_close,
    statistics_fail_on_the_last,
    statistics_fail_on_the_first,
    merging_fails_on_the_last,
    proposing_fails_on_the_last,
    histograms_fail_on_the_last,
    optimizers_in_turn,
    resumed,
    watched_by_one_alone,
    writes_nothing_elsewhere,
]


def scenarios(size: int) -> dict[str, Scenario]:
    """The same for any number of processes."""
    del size
    return {scenario.__name__: scenario for scenario in ALL}
