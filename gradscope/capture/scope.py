"""watch() and the Scope it returns: what a user holds while a model trains."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradscope.analysis.config import configured_rules
from gradscope.capture import compiled, fused
from gradscope.capture.arguments import (
    check_cadence,
    check_criterion,
    check_model,
    check_resume,
    check_selection,
    checked_optimizers,
    checked_scaler,
)
from gradscope.capture.attachment import attach, is_scripted
from gradscope.capture.bystander import Bystander
from gradscope.capture.cadence import checked_budget
from gradscope.capture.config import CaptureConfig, OnFinding, patterns
from gradscope.capture.context import is_compiled
from gradscope.capture.display import Display
from gradscope.capture.distributed import check_sharding, described_processes, processes
from gradscope.capture.exits import close_at_exit, close_earlier
from gradscope.capture.folders import run_folder
from gradscope.capture.guard import LOG, SCALARS, STEPS, Guard, Problem
from gradscope.capture.hooks import Hooks, owners
from gradscope.capture.live import Live
from gradscope.capture.meta import described
from gradscope.capture.names import unwrapped
from gradscope.capture.observer import Observer
from gradscope.capture.provisos import say_provisos
from gradscope.capture.reading import Reading
from gradscope.capture.recorder import Recorder
from gradscope.errors import ConfigTypeError, UsageError
from gradscope.log.reader import load, load_part
from gradscope.log.scalars import margin_layout
from gradscope.log.writer import RunWriter
from gradscope.record import Run

if TYPE_CHECKING:
    from gradscope.analysis.report import Report


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    criterion: nn.Module | None = None,
    *,
    log_dir: str | Path | None = None,
    every: int | None = None,
    budget: float | None = None,
    level: str = "full",
    scaler: object = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    on_finding: OnFinding | None = None,
    loss_is_progress: bool = True,
    resume: bool = False,
) -> "Scope":
    """Watch a model train.

    model: the model, before or after it is moved to its device. Nothing is planted on it but
        hooks, which `Scope.close()` removes; training does not change by one bit.
    optimizer: the optimizer or optimizers. Without it, every torch optimizer whose parameters
        overlap the model's counts, also one built later.
    criterion: the loss as a module; its loss, input and target are then seen without
        `Scope.log`.
    log_dir: the folder for the run, readable by TensorBoard. A folder that holds a run already
        gets a sibling, unless it is resumed. Without it the run is kept in a temporary folder
        while the Scope lives: on disk, unless the system keeps that folder (TMPDIR) in memory.
    every: record exactly every k-th step.
    budget: the share of the training time that watching may cost; 0.01, 1 %, where neither is
        given. The first ten steps are recorded, then as often as that allows over any minute, more
        often where the loss leaps up or is not finite. Where steps are so short that all of it
        comes to less than 0.2 s, that is spent. What is recorded takes 32 MB of the disk and 48
        bytes for every step of training at most, but for a few steps that show where it is.
    scaler: the GradScaler of the training: output gradients are then unscaled, too, and the run
        has the scale and which steps were skipped.
    level: "parameters" (gradients, weights), "full" (also updates, outputs, their gradients and
        dead units, and histograms of the parameters' gradients) or "deep" (also histograms of
        weights, updates, outputs and output gradients). What each costs in time and memory:
        docs/overhead.md.
    include, exclude: fnmatch patterns on qualified names of modules and parameters; one of
        include that matches none, and an exclude that leaves none, are refused.
    loss_is_progress: False where a falling loss is not the aim (GAN, RL, contrastive).
    resume: go on with the run in log_dir, after the last step that it holds, as one run; also
        after a kill. A folder without a run gets a new one. Restoring model and optimizer is
        yours; the same names and shapes keep their place, new ones are added.
    on_finding: a function that is called with each warning and error (a Finding), once per layer,
        on the thread that trains, between two steps, and at `close()` with the rest; what it
        raises is warned of. Another thread judges, within the budget (with every: 1 % of the
        time). "stop": the first error raises `errors.TrainingStopped` before the next step.

    Where several processes train, call it on each of them; rank 0 writes, and alone is told of
    findings. Where they split the parameters, what is recorded of these is of the whole.

    Raises ConfigError or ConfigTypeError for arguments that can't work, also for a run to be
    resumed that is not this model's, and for a mistake in pyproject.toml's `[tool.gradscope]`;
    LogError for a folder that can't be written or read, or a run to be resumed that another
    process writes to. Inside the training loop nothing is raised but what on_finding asks for.
    """
    check_cadence(every=every, budget=budget)
    check_resume(resume=resume, log_dir=log_dir)
    check_model(model)
    check_sharding(model)
    optimizers = checked_optimizers(model, optimizer)
    check_criterion(criterion)
    grad_scaler = checked_scaler(scaler)
    config = CaptureConfig(
        every=every,
        budget=checked_budget(budget),
        level=level,
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        loss_is_progress=loss_is_progress,
        on_finding=on_finding,
    )
    check_selection(model, config)
    earlier = [
        owner
        for owner in owners(unwrapped(model))
        if isinstance(owner, Scope) and not owner.is_closed
    ]
    if resume:
        # Theirs may be the run that goes on.
        close_earlier(earlier)
    scope = Scope(model, optimizers, criterion, config, log_dir, scaler=grad_scaler, resume=resume)
    close_earlier(earlier)
    return scope


class Scope:
    """A model being watched; made by `gradscope.watch`. Use it as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] | None,
        criterion: nn.Module | None,
        config: CaptureConfig,
        log_dir: str | Path | None,
        *,
        scaler: GradScaler | None,
        resume: bool = False,
    ) -> None:
        self._rules = configured_rules()
        self._config = config
        self._closed = False
        self._has_charts = False
        self._guard = Guard(self._write_problem)
        self._named_optimizers = optimizers is not None
        # What can fail must leave nothing behind.
        with ExitStack() as undo:
            self._begin(undo, model, optimizers, criterion, log_dir, scaler=scaler, resume=resume)
            undo.pop_all()
        self._live = Live(config, self._snapshot, self._rules, self._recorder, self._guard)
        if self._writes:
            self._live.follow(self._observer)

    def _begin(
        self,
        undo: ExitStack,
        model: nn.Module,
        optimizers: Sequence[Optimizer] | None,
        criterion: nn.Module | None,
        log_dir: str | Path | None,
        *,
        scaler: GradScaler | None,
        resume: bool,
    ) -> None:
        config = self._config
        scripted = is_scripted(model)
        # Of torch.compile(model) and DDP(model), the model: its names are the user's.
        core = unwrapped(model)
        known = processes()
        self._writes = known is None or known.writes
        outputs = config.is_full and not scripted and self._writes
        self._observer = Observer(
            core, config, self._guard, scaler, outputs=outputs, writes=self._writes
        )
        self._meta = described(core, config, criterion)
        if known is not None:
            self._meta["distributed"] = described_processes(core, known)
        folder = run_folder(self, log_dir, resume=resume, writes=self._writes)
        undo.callback(folder.discard)
        self.log_dir, self._temporary = folder.path, folder.temporary
        self._reading = Reading(self.log_dir, self._meta, self._guard, writes=self._writes)
        self._first_step = 0
        if folder.earlier is not None:
            self._observer.take_up(folder.earlier)
            self._first_step = folder.earlier.step
        self._recorder: Recorder = Bystander()
        if self._writes:
            writer = RunWriter(self.log_dir, self._meta, folder.earlier)
            undo.callback(writer.discard)
            self._recorder = Recorder(writer, weakref.WeakMethod(self._log_failed))
            undo.callback(self._recorder.close)
            self._observer.record_to(self._recorder)
        self._display = Display(self._part, self._rules, self._recorder, self._guard)
        if self._writes and not self._temporary:
            self._observer.on_record.append(self._display.recorded)
        self._hooks = Hooks(self)
        undo.callback(self._hooks.remove)
        attach(self._hooks, self._observer, core, optimizers, criterion)
        fused.prepare(core.parameters())
        if is_compiled(model):
            # It may have run before it had hooks.
            compiled.forget_graphs()
        say_provisos(
            self._guard, self._meta, scripted=scripted, earlier=folder.earlier, known=known
        )
        # For a Scope that is dropped without being closed.
        self._finalizer = weakref.finalize(self, self._recorder.abandon)
        self._finalizer.atexit = False
        self._forget_exit = close_at_exit(self)

    def log(
        self,
        *,
        loss: Tensor | float | None = None,
        target: Tensor | None = None,
        output: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
        **scalars: Tensor | float,
    ) -> None:
        """Tell what hooks can't see; before or after `optimizer.step()`.

        loss: the loss of the open step; several within a step count as their mean.
        target, output: tensors whose statistics are wanted.
        grad_norm: the global norm before clipping, for those who clip themselves.
        scalars: anything else that is a number: accuracy, temperature, …
        """
        if not self._closed:
            self._guard.run(
                SCALARS, self._observer.log, loss, target, output, grad_norm, dict(scalars)
            )

    def step(self) -> None:
        """Mark a step where the update is written by hand, without a torch optimizer.

        Call it after backward, before weights or gradients change. Raises UsageError where an
        optimizer is watched too: its steps are seen by themselves.
        """
        if self._named_optimizers or self._observer.optimizer_seen:
            message = (
                "scope.step() is for updates without an optimizer; this one is watched already"
            )
            raise UsageError(message)
        if not self._closed:
            self._guard.run(STEPS, self._observer.hand_step)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  (torch's signature)
        foreach: bool | None = None,  # noqa: FBT001
    ) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over all parameters of the model; returns the norm.

        The step's `grad_norm_before_clip` is the norm that torch found, `grad_norm_after_clip`
        what that leaves of it, `clipped` 1 where that is less. With a GradScaler call
        `scaler.unscale_(optimizer)` first, as for torch's own.
        """
        parameters = self._observer.model.parameters()
        norm = nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
        if not self._closed:
            self._guard.run(SCALARS, self._observer.clip, norm, max_norm)
        return norm

    def tensorboard(
        self,
        *,
        layers: str | Sequence[str] | None = None,
        histograms: str | Sequence[str] | None = None,
        margin_charts: bool = False,
    ) -> None:
        """Ask for more in TensorBoard than the tags that every model gets.

        Holds for the steps recorded from now on. Calls add up.

        layers: fnmatch patterns of parameters that get curves of their own, gradient norm and
            ‖Δw‖/‖w‖: `layer/<name>/grad_norm`, `layer/<name>/update_ratio`. 50 at most.
        histograms: fnmatch patterns of parameters of which the histograms tab shows how large
            the entries of the gradient are, as log10 of their magnitude:
            `log10_gradient/<name>`. 8 at most.
        margin_charts: a page in the custom scalars tab: the loss, and the median layer's gradient
            norm and update ratio in the band from the 5th to the 95th percentile.

        Beyond a limit the first in the model's order are taken, and a warning names the others.
        Raises ConfigError for a pattern that matches no watched parameter, ConfigTypeError for
        an argument of the wrong type, UsageError after `close()`.
        """
        if self._closed:
            message = "tensorboard() after close(): nothing more is recorded"
            raise UsageError(message)
        if not isinstance(margin_charts, bool):
            message = f"margin_charts={margin_charts!r} must be True or False"
            raise ConfigTypeError(message)
        self._observer.selection.add(layers, histograms)
        if self._temporary:
            message = "tensorboard() has no effect without watch(log_dir=...): nobody finds the run"
            self._guard.say("TensorBoard", message)
        if margin_charts and not self._has_charts:
            self._has_charts = True
            self._recorder.call(lambda writer: writer.show(0, [margin_layout()]))

    def run(self) -> Run:
        """The run so far, read back from its log: all of it; also after `close()`.

        Of several processes rank 0 has it; elsewhere it is empty and says so.
        """
        return self._read_back(load)

    def _part(self) -> Run:
        """Of a long run as much as may be in memory while it trains."""
        return self._read_back(load_part)

    def _snapshot(self) -> Callable[[], Run]:
        return self._reading.beside(self._observer.coverage())

    def _read_back(self, read: Callable[[Path], Run]) -> Run:
        if not self._closed:
            self._settle()
            self._recorder.flush()
        return self._reading.run(read, self._coverage)

    def _settle(self) -> None:
        """Hand over everything that is known."""
        self._guard.run(STEPS, self._observer.settle)
        self._coverage = self._observer.coverage()
        self._guard.run(LOG, self._observer.write_coverage, self._coverage)

    def report(self) -> "Report":
        """The findings so far, root causes first, by the project's rules; also after `close()`."""
        from gradscope.analysis.analyzer import analyze  # noqa: PLC0415  (only when asked for)

        return analyze(self.run(), self._rules)

    def close(self) -> None:
        """Remove all hooks and finish the log. Closing twice is harmless.

        Where parameters are split over processes, hooks that record nothing stay until the next
        step that would have been recorded: there the processes agree that it is over.
        """
        if self._closed:
            return
        if not self._observer.is_awaited():
            self._hooks.remove()
        self._observer.stop()
        self._observer.on_record.clear()
        self._settle()
        if self._writes and not self._temporary:
            self._display.refresh()
        self._closed = True
        self._observer.leave(self._hooks.remove)
        self._recorder.close()
        self._finalizer.detach()
        self._forget_exit()
        self._live.close()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._guard.say("training", f"training ended with {kind.__name__}", aloud=False)
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "watching"
        return f"<gradscope.Scope {state}, log_dir={str(self.log_dir)!r}>"

    def _write_problem(self, problem: Problem) -> None:
        step = self._first_step + self._observer.counts["closed_steps"]
        self._recorder.call(lambda writer: writer.problem(step, problem.part, problem.message))

    def _log_failed(self, reason: str) -> None:
        self._guard.disable(LOG, f"{reason}; nothing more is recorded in {str(self.log_dir)!r}")
