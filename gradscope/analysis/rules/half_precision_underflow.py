"""GS504 half-precision-underflow."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import module_of
from gradscope.analysis.optimizers import optimizers, rates_when_recorded
from gradscope.analysis.robust import F64, Bools, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Run, Table


@dataclass(frozen=True, slots=True)
class Limits:
    """When numbers count as lost to the dtype."""

    # Half of what is not zero is below 2**-14, where float16 has fewer bits the smaller it is:
    # loss scaling was made for such histograms (Micikevicius et al. 2018, section 3.2, without
    # a limit), and most entries are half.
    subnormal: float = 0.5
    # Without a loss that tells, only where hardly any entry has its full precision (as GS003).
    all_but_all: float = 0.9
    # Nine of ten entries stay as they were: the step is hardly taken.
    lost: float = 0.9
    # What float32 would keep: its neighbours are 6e-8 apart. Less than this share of a weight is
    # a small step, and no matter of half precision.
    kept_by_single: float = 1e-6
    # A warm-up begins with small steps; half of the records is not a beginning.
    min_share_of_steps: float = 0.5
    min_steps: int = 3


_SMALLEST_HALF = 2.0**-24


@rule("GS504", name="half-precision-underflow", limits=Limits())
def half_precision_underflow(run: Run, limits: Limits) -> Iterator[Finding]:
    """Gradients or updates are too small for the dtype, and are rounded away.

    ## What it measures
    The share of entries other than zero that are subnormal in half precision, of the gradients at
    modules' outputs and of parameters; and the share of entries of a weight that a step left as
    they were to the bit, though they had a gradient and the step was large enough for float32.

    ## Why it matters
    Float16 holds nothing below 6e-8, and little of what is below 6e-5. What is rounded to zero is
    no gradient. And a weight of bfloat16 keeps only changes of more than 1/512 of itself: an
    ordinary step of a thousandth leaves it where it is, at every step again.

    ## How sure it is
    Certain as to the numbers that were lost. That this holds the training up is likely, where
    the loss is stuck.

    ## Known limits
    Subnormal numbers still carry a few bits: without a stuck loss they are information, unless
    hardly any entry is larger and nothing is known of the loss. Lost updates are a warning where
    the loss has not converged; an optimizer that keeps the remainder (Kahan summation) or a copy
    in float32 of its own loses nothing, and is not recognized. Of optimizers other than SGD and
    those like Adam the intended step is not known.

    ## Example
    `model.to(torch.bfloat16)` with `torch.optim.AdamW(lr=1e-5)`: the weights do not move. Do
    instead: weights in float32 and `torch.autocast`, with a GradScaler in float16.

    ## References
    Micikevicius et al. 2018 (arXiv:1710.03740), sections 3.1 and 3.2; Zamirai et al. 2020
    (arXiv:2010.06192), on updates that bfloat16 loses.
    """
    loss = progress(run)
    faint, lost = _faint(run, limits), _lost(run, limits)
    if faint is None and lost is None:
        message = "no gradient in half precision was seen, nor a weight that loses its updates"
        raise UnjudgedError(message)
    if faint:
        yield _of_gradients(run, loss, faint, limits)
    if lost:
        yield _of_updates(run, loss, lost, limits)


def _of_gradients(
    run: Run, loss: Progress, faint: Mapping[str, tuple[str, float]], limits: Limits
) -> Finding:
    name, (_, portion) = next(iter(faint.items()))
    scale = run.scalars.get("loss_scale")
    scaled = scale is not None and not np.isnan(scale).all()
    last = float(scale[~np.isnan(scale)][-1]) if scale is not None and scaled else math.nan
    more = f" (and at {count(len(faint) - 1, 'other place')})" if len(faint) > 1 else ""
    of = f" at a loss scale of {number(last)}" if scaled else ""
    level = Severity.ERROR if loss.failed else Severity.INFO
    if loss.verdict is LossVerdict.UNKNOWN and portion >= limits.all_but_all:
        level = Severity.WARNING
    return half_precision_underflow.finding(
        level,
        name,
        f"{share(portion)} of the gradient's entries other than zero at {layer_in_words(name)}"
        f"{more} are too small for half precision{of}; {loss.words}.",
        evidence=tuple(
            Evidence(each, place, int(run.steps[0]), int(run.steps[-1]), amount, limits.subnormal)
            for place, (each, amount) in list(faint.items())[:3]
        ),
        remedies=(
            f"Raise the loss scale from {number(last)}: GradScaler(init_scale=2.0**16) finds it."
            if scaled
            else "Scale the loss: torch.amp.GradScaler multiplies it by 65,536 before the backward "
            "and divides the gradients again.",
            "Use bfloat16 in place of float16 (torch.autocast(…, dtype=torch.bfloat16)): it has "
            "the range of float32.",
        ),
    )


def _of_updates(run: Run, loss: Progress, lost: Mapping[str, float], limits: Limits) -> Finding:
    name = next(iter(lost))
    healthy = loss.verdict in {LossVerdict.CONVERGED, LossVerdict.PROVES_NOTHING}
    level = Severity.ERROR if loss.failed else Severity.INFO if healthy else Severity.WARNING
    held = int(held_weights(run).sum())
    return half_precision_underflow.finding(
        level,
        module_of(name),
        f"Steps leave {share(lost[name])} of the entries of {name} as they were, and most of "
        f"{len(lost)} of {count(held, 'weight')}: the change is smaller than half precision can "
        f"show; {loss.words}.",
        evidence=tuple(
            Evidence(
                "update_lost_fraction",
                weight,
                int(run.parameters.steps[0]),
                int(run.parameters.steps[-1]),
                amount,
                limits.lost,
            )
            for weight, amount in list(lost.items())[:3]
        ),
        remedies=(
            "Keep the weights in float32, and compute in half precision under torch.autocast.",
            "Or keep a copy of them in float32 for the optimizer, or one that keeps the remainder "
            "(Kahan summation, stochastic rounding).",
        ),
    )


def _faint(run: Run, limits: Limits) -> dict[str, tuple[str, float]] | None:
    """Place → quantity and share of subnormal entries; None where nothing is in half precision."""
    found: dict[str, tuple[str, float]] = {}
    seen = False
    for table, which, zeros in (
        (run.modules, "output_grad_underflow_fraction", "output_grad_zero_fraction"),
        (run.parameters, "grad_underflow_fraction", "grad_zero_fraction"),
    ):
        if which not in table or not measured(table[which]).any():
            continue
        # Of parameters every dtype is looked at: those of float32 have none.
        seen |= table is run.modules
        # Of most there are none.
        some = np.flatnonzero((table[which] > 0).any(axis=0))
        portions = _of_the_others(table[which][:, some], table[zeros][:, some])
        if table is run.parameters:
            # Smaller than any number of float16: it is float32's own end that is meant.
            portions[table["grad_absmax"][:, some] < _SMALLEST_HALF] = np.nan
        held = _lasting(portions >= limits.subnormal, measured(portions), limits)
        for column, portion in zip(held, np.nanmean(portions[:, held], axis=0), strict=True):
            found.setdefault(_place(table, int(some[column])), (which, float(portion)))
    worst = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
    return dict(worst) if seen or found else None


def _of_the_others(small: Any, zeros: Any) -> F64:
    """Subnormal entries among those that are not zero."""
    others = 1 - np.nan_to_num(zeros.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: F64 = np.where(others > 0, small / others, np.nan)
    return result


def _lasting(holds: Bools, known: Bools, limits: Limits) -> list[int]:
    """The columns of which it holds in enough records."""
    amount, total = (holds & known).sum(axis=0), known.sum(axis=0)
    enough = np.maximum(limits.min_steps, limits.min_share_of_steps * total)
    return [int(column) for column in np.flatnonzero(amount >= enough)]


def _place(table: Table, column: int) -> str:
    entity = table.entities[column]
    return entity.name if entity.kind != "parameter" else module_of(entity.name)


def _lost(run: Run, limits: Limits) -> dict[str, float] | None:
    """Weight → the share of entries that steps leave as they were; only if it is most weights."""
    table = run.parameters
    held = held_weights(run)
    if "update_lost_fraction" not in table or not measured(table["update_lost_fraction"]).any():
        return None
    values = table["update_lost_fraction"].astype(np.float64)
    lost = values >= limits.lost
    if not lost[:, held].any():
        return {}
    meant = _intended(run) >= limits.kept_by_single
    columns = _lasting(lost & meant, measured(values) & held, limits)
    if 2 * len(columns) <= int(held.sum()):
        return {}
    portions = dict(zip(columns, np.nanmean(values[:, columns], axis=0), strict=True))
    columns.sort(key=lambda column: (-portions[column], table.entities[column].depth))
    return {table.names[column]: float(portions[column]) for column in columns}


def _intended(run: Run) -> F64:
    """Per record and parameter: the step that was meant, relative to the weight, as far as known.

    Adam and its like move each entry by about the learning rate, SGD by the gradient times it;
    what did move is known of all.
    """
    table = run.parameters
    rate = rates_when_recorded(run)[:, None]
    size = table["weight_rms"].astype(np.float64)
    kinds = [one.type for one in optimizers(run)]
    step = np.full(size.shape, np.nan)
    if kinds and all("Adam" in kind or kind in {"Lion", "Adan", "LAMB"} for kind in kinds):
        step = np.broadcast_to(rate, size.shape)
    elif kinds and all(kind == "SGD" for kind in kinds):
        step = rate * table["grad_rms"].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        meant = np.fmax(step / size, table["update_ratio"].astype(np.float64))
    result: F64 = np.nan_to_num(meant, posinf=0.0)
    return result
