"""Histograms as the page draws them: few enough layers and steps for a ridge each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.analysis.report import Report
from gradscope.analysis.robust import Bools, measured
from gradscope.quantities import MAGNITUDES, Magnitudes
from gradscope.record import Run, StepArray, Table
from gradscope.reporters.figures.labels import MINOR_GROUPS, marked_rows
from gradscope.reporters.html.arrays import compressed
from gradscope.reporters.wording import inert

_MAX_RIDGES, _MAX_RIDGE_STEPS = 64, 40
# A share of the entries that would be no pixel high needs no room on the axis.
_VISIBLE = 0.002


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the counted entries are of, and the quantities of its table that say what was read."""

    title: str
    symbol: str
    known: str
    size: str


_KINDS: Mapping[Magnitudes, _Kind] = {
    "grad": _Kind("gradients", "|g|", "grad_nonfinite", "grad_norm"),
    "weight": _Kind("weights", "|w|", "weight_norm", "weight_norm"),
    "update": _Kind("updates", "|Δw|", "update_norm", "update_norm"),
    "output": _Kind("outputs", "|y|", "output_nonfinite", "output_rms"),
    "output_grad": _Kind(
        "output gradients", "|∂L/∂y|", "output_grad_nonfinite", "output_grad_norm"
    ),
}


def spreads(report: Report) -> list[dict[str, Any]]:
    """Of everything that was counted."""
    found = (_spread(report, of) for of in _KINDS)
    return [made for made in found if made is not None]


def _spread(report: Report, of: Magnitudes) -> dict[str, Any] | None:
    """The histograms of the largest things, weights and not biases, at a few steps."""
    histograms = report.run.histograms if of == "grad" else report.run.deep.get(of)
    if not histograms:
        return None
    marked = set(marked_rows(histograms.entities, report.findings))
    weights = [row for row, e in enumerate(histograms.entities) if e.group not in MINOR_GROUPS]
    rows = sorted(weights, key=lambda row: histograms.entities[row].depth)
    if len(rows) > _MAX_RIDGES:
        stride = -(-len(rows) // (_MAX_RIDGES // 2))
        found = [row for row in rows if row in marked][: _MAX_RIDGES // 2]
        kept = set(found) | set(rows[::stride])
        rows = [row for row in rows if row in kept]
    chosen = np.unique(
        np.linspace(0, len(histograms.steps) - 1, min(len(histograms.steps), _MAX_RIDGE_STEPS))
        .round()
        .astype(int)
    )
    counts = np.stack([histograms.at(int(index))[rows] for index in chosen], axis=1)
    rows, counts = _with_entries(rows, counts)
    if not rows:
        return None
    # Of what is not zero.
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True, dtype=np.float64), 1)
    seen = np.flatnonzero((shares >= _VISIBLE).any(axis=(0, 1)))
    first, last = max(0, int(seen[0]) - 1), min(histograms.bins, int(seen[-1]) + 2)
    # The root keeps small shares visible in a byte.
    roots = np.rint(255 * np.sqrt(shares[:, :, first:last])).astype(np.uint8)
    unread = _unmeasured(report.run, of, rows, histograms.steps[chosen])
    uncounted = ~counts.any(axis=2) & unread
    return {
        "title": _KINDS[of].title,
        "symbol": _KINDS[of].symbol,
        "layers": [inert(histograms.entities[row].name) for row in rows],
        "steps": histograms.steps[chosen].tolist(),
        "lowest": histograms.lowest + first,
        "bins": last - first,
        "roots": compressed(roots),
        "unmeasured": compressed(uncounted.astype(np.uint8)),
    }


def _unmeasured(run: Run, of: Magnitudes, rows: list[int], steps: StepArray) -> Bools:
    """Layers × steps: where nothing was read, or what has entries was not counted."""
    table: Table = getattr(run, MAGNITUDES[of])
    kind = _KINDS[of]
    at = np.searchsorted(table.steps, steps)
    unread = ~measured(table[kind.known][at][:, rows])
    # Sparse and large, or histograms were switched off.
    unread |= table[kind.size][at][:, rows] > 0
    return unread.T


def _with_entries(rows: list[int], counts: Any) -> tuple[list[int], Any]:
    some = counts.any(axis=(1, 2))
    return [row for row, kept in zip(rows, some, strict=True) if kept], counts[some]
