"""GS308 batchnorm-statistics-stale."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.robust import measured
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, listed, number
from gradscope.record import Entity, FloatArray, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When running statistics count as stale."""

    # With torch's momentum of 0.1, five steps move them by 41 % of the way; none moves them to
    # the bit only where they are not updated.
    min_steps: int = 5
    # A batch moves a norm's statistics by momentum times its own noise, some percent: all of a
    # hundred steps together by far more than this, with any momentum above 1e-4.
    barely: float = 1e-3
    many_steps: int = 100
    # … of statistics that still are the 0 and 1 they began with: others may have arrived.
    at_start: float = 1e-2


@rule(
    "GS308",
    name="batchnorm-statistics-stale",
    requires=("modules.buffer_norm", "modules.training"),
    limits=Limits(),
)
def batchnorm_statistics_stale(run: Run, limits: Limits) -> Iterator[Finding]:
    """Batch norms train, and their running mean and variance never move.

    ## What it measures
    The norm of each batch norm's running mean and variance, at all recorded steps in which it ran
    in training mode: the same to the bit at each of them, or over a hundred steps in effect still
    at 0 and 1, where they began.

    ## Why it matters
    In training a batch norm uses the batch's own mean and variance; at evaluation it uses the
    running ones. Where these stay at what they were (0 and 1, or those of another data set), the
    network is another one at evaluation than the one that was trained: the training loss is fine,
    the validation loss is not.

    ## How sure it is
    Certain: the statistics are compared to the bit. That evaluation will be wrong follows.

    ## Known limits
    In evaluation mode the statistics are meant to stay (GS009 tells whether the mode is). Of a
    norm without running statistics (`track_running_stats=False`) there are none to be stale. The
    training loss shows no harm, so that none is asked for.

    ## Example
    `nn.BatchNorm2d(64, momentum=0.0)`: torch's momentum is the weight of the new batch, other
    libraries' that of the old. Do instead: `momentum=0.1`.

    ## References
    Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.1; Wu & Johnson 2021 (arXiv:2105.07576),
    section 3.
    """
    table = run.modules
    norms, training = table["buffer_norm"], table["training"] == 1
    found = []
    for column in np.flatnonzero((training & measured(norms)).any(axis=0)):
        rows = np.flatnonzero(training[:, column] & measured(norms[:, column]))
        values = norms[rows, column]
        if rows.size < limits.min_steps:
            continue
        span = int(table.steps[rows[-1]] - table.steps[rows[0]]) + 1
        entity = table.entities[column]
        if (values == values[0]).all() or (
            span >= limits.many_steps and _barely_moves(entity, values, limits)
        ):
            found.append((entity, rows))
    if not found:
        return
    found.sort(key=lambda each: each[0].depth)
    names = [layer_in_words(entity.name) for entity, _ in found]
    entity, rows = found[0]
    value = float(norms[rows[0], table.names.index(entity.name)])
    moved = bool((norms[rows, table.names.index(entity.name)] != np.float32(value)).any())
    how = "hardly moved" if moved else "did not move"
    yield batchnorm_statistics_stale.finding(
        Severity.WARNING,
        entity.name,
        f"The running mean and variance of {listed(names)} {how} in "
        f"{rows.size} recorded steps in training mode (their norm stays {number(value)}): "
        "evaluation will use others than training did.",
        evidence=tuple(
            Evidence(
                "buffer_norm",
                norm.name,
                int(table.steps[seen[0]]),
                int(table.steps[seen[-1]]),
                float(norms[seen[0], table.names.index(norm.name)]),
            )
            for norm, seen in found[:3]
        ),
        remedies=(
            f"Set momentum=0.1 in {listed(names)}: torch's momentum is the weight of the new "
            "batch, and at 0 the old statistics stay for good.",
            "If old statistics are meant to stay, put these layers into evaluation mode "
            "(norm.eval()), so that training uses them, too.",
            "Or let evaluation use the batch's own: track_running_stats=False.",
        ),
    )


def _barely_moves(entity: Entity, norms: FloatArray, limits: Limits) -> bool:
    """Whether mean and variance are in effect still the 0 and 1 they began with."""
    channels = entity.shape[1] if len(entity.shape) > 1 else 0
    start = channels**0.5
    wide = norms.astype(np.float64)
    near = bool((np.abs(wide - start) <= limits.at_start * start).all())
    return near and float(np.abs(np.diff(wide)).sum()) <= limits.barely * start
