"""Train a case under gradscope, and hold the report against its diagnosis."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

import gradscope
from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Severity
from gradscope.analysis.report import Report
from gradscope.record import Run
from tests.zoo.case import Faulty, Healthy


class Watcher:
    """gradscope's `watch` as a program is given it; it keeps the log in a folder."""

    def __init__(self, log_dir: Path, every: int | None) -> None:
        self._log_dir, self._every = log_dir, every

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        criterion: nn.Module | None = None,
        *,
        scaler: object = None,
        loss_is_progress: bool = True,
    ) -> AbstractContextManager[gradscope.Scope]:
        return gradscope.watch(
            model,
            optimizer,
            criterion,
            log_dir=self._log_dir,
            every=self._every,
            scaler=scaler,
            loss_is_progress=loss_is_progress,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the report says: the codes of its complaints, those that nothing explains first."""

    complaints: tuple[str, ...]
    roots: tuple[str, ...]
    failures: tuple[str, ...]

    def names(self, accepts: Sequence[str]) -> bool:
        """Whether the right cause is among the roots."""
        return any(code in accepts for code in self.roots)

    def leads(self, accepts: Sequence[str]) -> bool:
        """Whether the right cause comes first."""
        return bool(self.roots) and self.roots[0] in accepts


def trained(
    case: Faulty | Healthy,
    folder: Path,
    *,
    seed: int,
    every: int | None = 1,
    repaired: bool = False,
) -> Run:
    """The run of a case; of its twin, if repaired. `every=None` is the default budget.

    A folder that holds the run is read instead.
    """
    if not folder.exists():
        torch.manual_seed(seed)
        watcher = Watcher(folder, every)
        if isinstance(case, Faulty):
            case.train(watcher, repaired=repaired)
        else:
            case.train(watcher)
    return gradscope.load(folder)


def judged(run: Run) -> Verdict:
    """What gradscope says of a run."""
    return verdict(analyze(run))


def verdict(report: Report) -> Verdict:
    """The report in short: without what is only information."""
    loud = [found for found in report.findings if found.severity is not Severity.INFO]
    return Verdict(
        tuple(found.code for found in loud),
        tuple(found.code for found in loud if not found.explained_by),
        tuple(skip.reason for skip in report.skipped if skip.reason.startswith("failed")),
    )
