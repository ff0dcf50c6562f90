"""GS505 half-precision-overflow."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.lasting import lasting
from gradscope.analysis.nonfinite import LARGEST_HALF, earliest, in_half, inner_first, when
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an activation counts as too large for float16; shares of its largest number, 65,504."""

    # One doubling left.
    near: float = 0.5
    # The finite entries of an output whose others have overflowed reach about as far: within a
    # factor of four of the end.
    beside: float = 0.25
    # More than one step in ten is no exception (as in GS501).
    min_share_of_steps: float = 0.1
    min_steps: int = 3


@rule("GS505", name="half-precision-overflow", limits=Limits())
def half_precision_overflow(run: Run, limits: Limits) -> Iterator[Finding]:
    """Activations reach the end of float16's range.

    ## What it measures
    The largest magnitude in the output of each module whose gradient is in half precision:
    infinite entries beside finite ones near 65,504, or finite ones above half of it up to the last
    records.

    ## Why it matters
    Beyond 65,504 float16 has only infinity. Unlike a gradient that overflows, for which the loss
    scale is lowered, an activation does not depend on the scale: a GradScaler halves it at every
    step, skips them all, and the model stands still.

    ## How sure it is
    Certain where entries are infinite; a warning ahead of time, hence possible, while all are
    finite.

    ## Known limits
    bfloat16 has the range of float32: where any entry is beyond 65,504 nothing is said. While all
    is finite it is information. What is called inside a compiled model is not seen.

    ## Example
    A sum over 10,000 positions under `torch.autocast(dtype=torch.float16)`. Do instead: a mean,
    or the sum in float32, or `dtype=torch.bfloat16`.

    ## References
    Micikevicius et al. 2018 (arXiv:1710.03740), section 3.3; IEEE 754-2019, table 3.5 (binary16).
    """
    table = run.modules
    columns = [int(column) for column in np.flatnonzero(in_half(run))]
    if not columns:
        message = "no output in half precision was seen"
        raise UnjudgedError(message)
    sizes = table["output_absmax"].astype(np.float64)
    if (np.nan_to_num(sizes[:, columns]) > LARGEST_HALF).any():
        return
    columns.sort(key=lambda column: inner_first(table, column))
    broken = np.nan_to_num(table["output_nonfinite"]) > 0
    over = broken & (np.nan_to_num(sizes) >= limits.beside * LARGEST_HALF)
    for row in np.flatnonzero(over[:, columns].any(axis=1)):
        column = next(column for column in columns if broken[row, column])
        # What broke before it, at the same step, was not its overflow.
        if over[row, column]:
            yield _overflowed(run, int(row), column, float(sizes[row, column]), limits)
            return
    for column in columns:
        values: F64 = sizes[:, column]
        if not (values >= limits.near * LARGEST_HALF).any():
            continue
        onset = lasting(
            values,
            values >= limits.near * LARGEST_HALF,
            least=limits.min_steps,
            share=limits.min_share_of_steps,
        )
        if onset is not None:
            yield _near(run, onset, column, limits)
            return


def _overflowed(run: Run, row: int, column: int, size: float, limits: Limits) -> Finding:
    table = run.modules
    name = table.names[column]
    rows = np.flatnonzero(np.nan_to_num(table["output_nonfinite"][:, column]) > 0)
    portion = rows.size / len(table.steps)
    stays = portion > limits.min_share_of_steps or bool(rows[-1] == len(table.steps) - 1)
    skips = run.scalars.get("skipped")
    lost = float(np.nanmean(skips)) if skips is not None and measured(skips).any() else 0.0
    also = f"; {share(lost)} of all steps were skipped" if lost else ""
    return half_precision_overflow.finding(
        Severity.ERROR if stays else Severity.INFO,
        name,
        f"The output of {layer_in_words(name)} went beyond float16's largest number, 65,504, "
        f"{when(table, row)} (what stayed finite reached {number(size)}), in "
        f"{count(rows.size, 'recorded step')}{also}.",
        evidence=(
            Evidence(
                "output_absmax",
                name,
                earliest(table, row),
                int(table.steps[rows[-1]]),
                size,
                LARGEST_HALF,
            ),
        ),
        remedies=_remedies(name),
    )


def _near(run: Run, onset: int, column: int, limits: Limits) -> Finding:
    table = run.modules
    name = table.names[column]
    known = table["output_absmax"][:, column]
    largest = float(np.nanmax(known))
    return half_precision_overflow.finding(
        Severity.INFO,
        name,
        f"The output of {layer_in_words(name)} reaches {number(largest)}; if it is in float16, "
        f"that ends at 65,504, {number(LARGEST_HALF / largest)} times as much.",
        evidence=(
            Evidence(
                "output_absmax",
                name,
                int(table.steps[onset]),
                int(table.steps[-1]),
                largest,
                limits.near * LARGEST_HALF,
            ),
        ),
        remedies=_remedies(name),
    )


def _remedies(name: str) -> tuple[str, ...]:
    return (
        "Use bfloat16 in place of float16 (torch.autocast(…, dtype=torch.bfloat16)): it has the "
        "range of float32.",
        f"Compute {layer_in_words(name)} in float32: torch.autocast(…, enabled=False) around it.",
        f"Make what comes into {layer_in_words(name)} smaller: a norm before it, a mean in place "
        "of a sum, smaller weights.",
    )
