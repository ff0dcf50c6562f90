"""How much of the model the records hold, step by step: what was expected, what was seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.layers import ROOT
from gradscope.analysis.robust import Bools, measured
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one kind of thing: how many were expected in a step, and what was not seen, and why."""

    expected: int
    # Name → why.
    unseen: Mapping[str, str]

    @property
    def amount(self) -> int:
        """How many were seen."""
        return self.expected - len(self.unseen)


@dataclass(frozen=True, slots=True)
class Coverage:
    """The recorded step in which the least was seen; the first, if it is several.

    Parameters are expected where they are trainable, and seen where their gradient was read.
    Modules are expected, in steps in which any ran, that ran in the first of these; and seen where
    the output of any use was measured.
    """

    step: int
    # Whether it was the same in every recorded step.
    always: bool
    parameters: Seen
    modules: Seen

    @property
    def kinds(self) -> dict[str, Seen]:
        """By what each is called."""
        return {"parameter": self.parameters, "module": self.modules}


def coverage(run: Run) -> Coverage | None:
    """What was seen where the least was; None where nothing was recorded."""
    steps = run.recorded_steps
    if not len(steps):
        return None
    table = run.parameters
    trainable = table["requires_grad"] == 1
    unread = trainable & ~measured(table["grad_nonfinite"])
    names, ran = _ran(run)
    expected = ran[int(np.argmax(ran.any(axis=1)))]
    idle = expected & ~ran
    # Where none is recorded at all they were not asked for, or a problem says why.
    idle[~ran.any(axis=1)] = False
    worst = int(np.argmax(unread.sum(axis=1) + idle.sum(axis=1)))
    always = bool((unread == unread[worst]).all() and (idle == idle[worst]).all())
    parameters = {
        table.names[index]: _why_unread(run, worst, int(index))
        for index in np.flatnonzero(unread[worst])
    }
    reasons = reasons_of_modules(run)
    modules = {
        names[index]: reasons.get(names[index], "nothing ran there")
        for index in np.flatnonzero(idle[worst])
    }
    return Coverage(
        int(steps[worst]),
        always,
        Seen(int(trainable[worst].sum()), parameters),
        Seen(int(expected.sum()), modules),
    )


def elsewhere(run: Run) -> str:
    """Who has the run, where it is another process than this one; "" where it is this one."""
    known = run.meta.get("distributed")
    if not isinstance(known, Mapping) or not known.get("rank"):
        return ""
    return f"rank 0 of {known.get('world_size')} processes has the report"


def never_ran(run: Run) -> list[str]:
    """The modules that did not run in any recorded step.

    Nor the parts of which ran: a loop may call these one by one, as GANs do.
    """
    ran = {_module(name) for name in run.modules.names}
    around = {name[:end] for name in ran for end in _ends(name)}
    if ran:
        around.add(ROOT)
    return [str(name) for name in _noted(run).get("never_ran", ()) if name not in ran | around]


def reasons_of_modules(run: Run) -> dict[str, str]:
    """Module → why it is not seen, where capture knows."""
    return {str(name): str(why) for name, why in _noted(run).get("reasons", {}).items()}


def _noted(run: Run) -> Mapping[str, Any]:
    """What capture noted of the modules."""
    known: Any = run.meta
    for key in ("coverage", "modules"):
        known = known.get(key) if isinstance(known, Mapping) else None
    return known if isinstance(known, Mapping) else {}


def _ends(name: str) -> list[int]:
    """Where the names of the modules around it end."""
    return [end for end, letter in enumerate(name) if letter == "."]


def _module(use: str) -> str:
    return use.partition("#")[0]


def _ran(run: Run) -> tuple[list[str], Bools]:
    """The modules, and at which recorded steps an output of each was measured."""
    table = run.modules
    bases = [_module(name) for name in table.names]
    names = list(dict.fromkeys(bases))
    ran: Bools = np.zeros((len(run.recorded_steps), len(names)), dtype=bool)
    at = np.searchsorted(run.recorded_steps, table.steps)
    place = {name: column for column, name in enumerate(names)}
    known = measured(table["output_nonfinite"])
    for base, use in zip(bases, known.T, strict=True):
        ran[at, place[base]] |= use
    return names, ran


def _why_unread(run: Run, row: int, index: int) -> str:
    table = run.parameters
    if table["in_optimizer"][row, index] == 0:
        return "no optimizer in charge was seen"
    if table["grad_missing"][row, index] == 1:
        return "no gradient arrived"
    return "the optimizer in charge did not step"
