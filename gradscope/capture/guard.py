"""The one place where a failure of gradscope's own ends: a part is disabled, training goes on."""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

import torch

from gradscope import errors
from gradscope.errors import GradscopeWarning

P = ParamSpec("P")

# The parts that can be disabled one by one.
STEPS = "step tracking"
OUTPUTS = "module outputs"
TIME = "gradients along time"
SCALARS = "scalars"
GRAPH = "autograd graph"
SIGNALS = "signals"
HISTOGRAMS = "histograms"
PROBES = "probes"
LOG = "log"
FINDINGS = "findings as text"
WORST_LAYERS = "worst layers as text"
PICTURES = "pictures for TensorBoard"
DISPLAY = "the report in TensorBoard"
LIVE = "findings during training"
ON_FINDING = "on_finding"

_NOT_THE_USERS = tuple(str(Path(module.__file__ or "").parent) for module in (errors, torch))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be done, and which part of gradscope it stopped or limits."""

    part: str
    message: str


def warn(message: str) -> None:
    """Tell the user once; a filter that turns warnings into errors must not stop training."""
    # Shown at the user's line: the frames up to there are gradscope's and torch's.
    level, frame = 1, sys._getframe()  # noqa: SLF001  (documented; inspect's way is slow)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    # The user's filters and their own showwarning may raise.
    with contextlib.suppress(Exception):
        warnings.warn(f"gradscope: {message}", GradscopeWarning, stacklevel=level)


def in_words(error: BaseException) -> str:
    """Type and text of an exception; some have a text that fails in its turn."""
    text = "?"
    with contextlib.suppress(Exception):
        text = str(error)
    return f"{type(error).__name__}: {text}"


class Guard:
    """Runs gradscope's code inside the training loop; nothing it catches reaches the loop."""

    def __init__(self, report: Callable[[Problem], None]) -> None:
        self._report = report
        # Set by who owns a part: releases what the part holds when it is disabled.
        self.on_disable: dict[str, Callable[[], None]] = {}
        self._disabled: set[str] = set()
        self._said: set[Problem] = set()
        self.problems: list[Problem] = []
        self._began: float | None = None
        self._inside = False
        self._spent = 0.0

    def run(self, part: str, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run the action unless its part is disabled; an exception disables the part."""
        if part in self._disabled:
            return
        # What runs within another is in its time.
        outermost, self._inside = not self._inside, True
        start = time.perf_counter()
        if self._began is None:
            self._began = start
        try:
            # What subclasses of Tensor and modes do at every operation is not to be done at ours.
            with torch._C.DisableTorchFunction():  # noqa: SLF001  (torch's documented way)
                action(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (training must not stop because of us)
            self.disable(part, in_words(error))
        finally:
            if outermost:
                self._inside = False
                self._spent += time.perf_counter() - start

    def seconds(self) -> tuple[float, float]:
        """How long the training loop waited for gradscope, and since when: in seconds.

        Of a device that runs on its own, what the host waited.
        """
        whole = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._spent, whole

    def is_disabled(self, part: str) -> bool:
        """Whether the part was switched off."""
        return part in self._disabled

    def disable(self, part: str, reason: str) -> None:
        """Switch a part off for the rest of the run, and say so once."""
        if part not in self._disabled:
            self.end(part)
            self.say(part, f"{part} disabled: {reason}")

    def end(self, part: str) -> None:
        """Switch a part off for the rest of the run, for a reason that needs no saying."""
        if part not in self._disabled:
            self._disabled.add(part)
            with contextlib.suppress(Exception):
                self.on_disable.get(part, lambda: None)()

    def say(self, part: str, message: str, *, aloud: bool = True) -> None:
        """Note a limit for the report, once, and aloud if the user should act on it."""
        problem = Problem(part, message)
        if problem in self._said:
            return
        self._said.add(problem)
        self.problems.append(problem)
        with contextlib.suppress(Exception):
            self._report(problem)
        if aloud:
            warn(message)
