"""Trainings of which findings are told, with analyses that find what they are to find."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.report import Report
from gradscope.capture.scope import Scope, watch
from gradscope.record import Run
from tests.capture.trainings import sgd, vectors

# What an analysis finds, by its number.
Script = dict[int, list[Finding]]


def finding(
    code: str = "GS101", layer: str | None = "0", severity: Severity = Severity.WARNING
) -> Finding:
    return Finding(code, code.lower(), severity, layer, "…", (Evidence("x", layer, 0, 1, 1.0),))


def always(found: list[Finding]) -> Script:
    return dict.fromkeys(range(50), found)


LOSS = nn.CrossEntropyLoss()


def watched(model: nn.Module, **arguments: Any) -> Scope:
    return watch(model, criterion=LOSS, **{"every": 1, **arguments})


ERROR = finding("GS401", None, Severity.ERROR)
NAN = finding("GS503", "2", Severity.ERROR)


@dataclass
class Judge:
    """Stands in for the rules: finds what is written; keeps what it was shown, and where."""

    script: Script
    runs: list[Run]
    threads: list[str]

    def __call__(self, run: Run, rules: object = None) -> Report:
        del rules
        found = self.script.get(len(self.runs), [])
        self.runs.append(run)
        self.threads.append(threading.current_thread().name)
        return Report(run, tuple(found), (), ())


GetJudge = Callable[[Script], Judge]


def finish_analysis() -> None:
    """Wait until none goes on."""
    for thread in threading.enumerate():
        if thread.name == "gradscope-live":
            thread.join()


def train(
    model: Callable[..., Any], steps: int, after: Callable[[int], object] = lambda _: None
) -> None:
    """Some steps, between which any analysis comes to its end."""
    assert isinstance(model, nn.Module)
    optimizer = sgd(model)
    for number in range(steps):
        torch.manual_seed(number)
        x, y = vectors()
        loss = LOSS(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish_analysis()
        after(number)


def every_step(clock: SimpleNamespace) -> Callable[[int], None]:
    """Make so much time pass in a step that each record is analyzed."""

    def pass_by(_: int) -> None:
        clock.seconds += 10.0

    return pass_by


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]
