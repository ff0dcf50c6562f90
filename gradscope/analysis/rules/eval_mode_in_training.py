"""GS009 eval-mode-in-training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress, stuck_before
from gradscope.analysis.layers import module_of, part_of
from gradscope.analysis.robust import F64, at_last, measured, median, since
from gradscope.analysis.rule import rule
from gradscope.analysis.words import count, listed, number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a module counts as left in evaluation mode."""

    # A step or two may be the user's own check.
    min_steps: int = 5
    # What came last, and lasted.
    min_share_of_steps: float = 0.2
    # A batch norm's output has the scale of its weight, which starts at 1: a tenth or ten times
    # that is what a norm is there to prevent (AUTOTRAINER: abnormal from 10 on).
    too_large: float = 10.0
    too_small: float = 0.1
    # The running mean is 0 and the variance 1 until the first batch: to what float32 holds.
    untouched: float = 1e-5


@dataclass(frozen=True, slots=True)
class _Off:
    """A module in evaluation mode up to the end: its column, and since which recorded step."""

    entity: Entity
    column: int
    step: int
    # Whether it was in training mode before.
    switched: bool

    @property
    def drops(self) -> bool:
        """Whether it is a dropout; else it is a batch norm."""
        return "Dropout" in self.entity.type


@rule("GS009", name="eval-mode-in-training", requires=("modules.training",), limits=Limits())
def eval_mode_in_training(run: Run, limits: Limits) -> Iterator[Finding]:
    """Dropout or batch norms are in evaluation mode while the model is trained.

    ## What it measures
    The mode of each dropout and batch norm when it ran in a step of the training: whether it was
    in evaluation mode up to the end, and in training mode before. Of batch norms that never were
    in training mode, whether their running statistics are still those of a new layer.

    ## Why it matters
    In evaluation mode dropout does nothing, and a batch norm uses what it gathered earlier in
    place of the batch. Left behind by `model.eval()` in front of a validation, that is another
    model than was asked for: it overfits, and its norms no longer follow the weights. A new batch
    norm in evaluation mode does not normalize at all.

    ## How sure it is
    Certain as to the mode, which is read. Whether it was meant is likely at best: hence it is a
    warning only where it changed on the way, or does harm.

    ## Known limits
    A frozen part rests in evaluation mode, and batch norms often do in fine-tuning and at the end
    of a training: in order, and information. Dropout that was off all along may be meant, and its
    harm does not show while training: information, too. It is a warning where dropout was on and
    then stayed off, and where new batch norms pass on what they get and it is off scale, or the
    loss is stuck.

    ## Example
    `model.eval()` in `validate()`, and no `model.train()` after it. Do instead: `model.train()` at
    the beginning of each epoch.

    ## References
    PyTorch's documentation of `nn.Module.eval`; Ioffe & Szegedy 2015 (arXiv:1502.03167), section
    3.1; Wu & Johnson 2021 (arXiv:2105.07576), "Rethinking 'Batch' in BatchNorm", section 3, on
    norms that are frozen in order.
    """
    off = [module for module in _left_off(run, limits) if _matters(run, module)]
    if not off:
        return
    awake = [module for module in off if not _rests(run, module.entity)]
    new = [module for module in awake if _is_new(run, module, limits)]
    loss = progress(run)
    dropped = [module for module in awake if module.drops and module.switched]
    harmed = dropped or (new if _harms(run, new, loss, limits) else [])
    severity = Severity.WARNING if harmed else Severity.INFO
    shown = harmed or awake or off
    first = min(module.step for module in shown)
    last = int(run.modules.steps[-1])
    yield eval_mode_in_training.finding(
        severity,
        module_of(shown[0].entity.name) if len(shown) > 1 else shown[0].entity.name,
        f"{_what(shown)} ({listed([module.entity.name for module in shown])}) "
        f"{'is' if len(shown) == 1 else 'are'} in evaluation mode {_since(shown, first)}"
        f"{_reason(run, shown, new=shown is new, resting=not awake)}; {loss.words}.",
        evidence=tuple(
            Evidence("training", module.entity.name, module.step, last, 0.0, 1.0)
            for module in shown[:3]
        ),
        remedies=(
            "Call model.train() at the beginning of each epoch, and after every validation that "
            "called model.eval().",
            "If a part is meant to rest: requires_grad_(False) on its parameters says so.",
        ),
    )


def _left_off(run: Run, limits: Limits) -> Iterator[_Off]:
    """The modules that have been in evaluation mode up to the end."""
    table = run.modules
    for column, values in enumerate(table["training"].T):
        known = np.flatnonzero(measured(values))
        begin = since(values[known] == 0)
        needed = max(limits.min_steps, limits.min_share_of_steps * known.size)
        if known.size - begin >= needed:
            yield _Off(table.entities[column], column, int(table.steps[known[begin]]), begin > 0)


def _matters(run: Run, module: _Off) -> bool:
    """Whether the mode makes a difference: not that of a dropout of nothing."""
    rates = run.meta.get("dropout")
    known = rates.get(part_of(module.entity.name)) if isinstance(rates, Mapping) else None
    return not (module.drops and known == 0)


def _rests(run: Run, entity: Entity) -> bool:
    """Whether nothing trains there: of a batch norm itself, of a dropout what is beside it."""
    own = _trainable(run, part_of(entity.name))
    if own is None:
        parent = part_of(entity.name).rpartition(".")[0]
        own = _trainable(run, parent) if parent else None
    return own is False


def _trainable(run: Run, module: str) -> bool | None:
    """Whether any parameter within the module is trainable; None without one."""
    inside = [name.startswith(f"{module}.") for name in run.parameters.names]
    if not any(inside):
        return None
    return bool((run.parameters["requires_grad"][:, inside] == 1).any())


def _is_new(run: Run, module: _Off, limits: Limits) -> bool:
    """Whether a batch norm has never seen a batch: √C is the norm of C zeros and C ones."""
    shape = module.entity.shape
    if module.drops or module.switched or len(shape) < 2:  # noqa: PLR2004  (batch, channels)
        return False
    norms = run.modules["buffer_norm"][:, module.column].astype(np.float64)
    known = norms[measured(norms)]
    fresh = np.sqrt(shape[1])
    return bool(known.size and (np.abs(known - fresh) <= limits.untouched * fresh).all())


def _harms(run: Run, new: list[_Off], loss: Progress, limits: Limits) -> bool:
    if not new or LossVerdict.CONVERGED in {loss.verdict, loss.before}:
        return False
    if loss.failed and not stuck_before(run, min(module.step for module in new)):
        return True
    scale = _scale(run, new)
    return bool(((scale > limits.too_large) | (scale < limits.too_small)).any())


def _scale(run: Run, modules: list[_Off]) -> F64:
    columns = [module.column for module in modules]
    return median(at_last(run.modules["output_rms"][:, columns], 3), axis=0)


def _what(modules: list[_Off]) -> str:
    dropouts = sum(module.drops for module in modules)
    parts = [
        count(amount, noun)
        for amount, noun in ((dropouts, "dropout"), (len(modules) - dropouts, "batch norm"))
        if amount
    ]
    return " and ".join(parts)


def _since(modules: list[_Off], first: int) -> str:
    if any(module.switched for module in modules):
        return f"since step {first}, and in training mode before"
    return "in all recorded steps"


def _reason(run: Run, shown: list[_Off], *, new: bool, resting: bool) -> str:
    if resting:
        return "; no parameter is trained there, so that this is in order"
    if not new:
        return ""
    scale = _scale(run, shown)
    known = scale[measured(scale)]
    of = f" (outputs have an rms of up to {number(float(known.max()))})" if known.size else ""
    return f", with the statistics of a new layer, so that nothing is normalized{of}"
