"""Runs over many steps made by hand, with updates and histograms of magnitudes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.record import Entity, Histograms, Run, pack_counts
from tests.reporters.samples import finding, parameter, run_of, table

LOWEST, BINS = -30, 40


def with_updates(
    ratios: ArrayLike, *, steps: Sequence[int] | None = None, groups: Sequence[str] = ()
) -> Run:
    """A run with these update ratios (steps × parameters)."""
    grid = np.atleast_2d(np.asarray(ratios, np.float32))
    steps = range(len(grid)) if steps is None else steps
    layers = grid.shape[1]
    kinds = [*groups, *["weight"] * (layers - len(groups))]
    entities = [parameter(f"layers.{index}.weight", index, kinds[index]) for index in range(layers)]
    made = run_of(np.ones_like(grid), steps=steps)
    return replace(
        made, parameters=table("parameters", entities, steps, grad_norm=1, update_ratio=grid)
    )


def with_magnitudes(
    counts: Mapping[str, NDArray[np.uint32]],
    *,
    sizes: Mapping[str, int] | None = None,
    zeros: ArrayLike = 0,
    nonfinite: ArrayLike = 0,
    steps: Sequence[int] | None = None,
) -> Run:
    """A run with these counts of magnitudes (steps × bins) of each parameter."""
    sizes = sizes or {}
    entities = [
        Entity(name, "parameter", (), sizes.get(name, 256), depth, "weight", "Linear")
        for depth, name in enumerate(counts)
    ]
    stacked = np.stack(list(counts.values()), axis=1)
    steps = range(len(stacked)) if steps is None else steps
    recorded = np.array(steps, np.int64)
    parameters = table(
        "parameters", entities, steps, grad_zero_fraction=zeros, grad_nonfinite=nonfinite
    )
    packed = tuple(pack_counts(step) for step in stacked)
    histograms = Histograms(tuple(entities), recorded, LOWEST, BINS, packed)
    made = run_of(np.ones((len(recorded), 1)), steps=steps)
    return replace(made, parameters=parameters, histograms=histograms)


def counted(*powers: Mapping[int, int]) -> NDArray[np.uint32]:
    """Counts per step, of the bins whose lower edges are these powers of two."""
    counts = np.zeros((len(powers), BINS), np.uint32)
    for step, known in enumerate(powers):
        for power, amount in known.items():
            counts[step, power - LOWEST] = amount
    return counts


def seen(
    code: str,
    first: int,
    last: int,
    layer: str | None = "layers.0",
    severity: Severity = Severity.ERROR,
) -> Finding:
    """A finding at these steps."""
    evidence = (Evidence("grad_norm", layer, first, last, 1.0),)
    return finding(code, "made-up", severity, layer, evidence=evidence)
