"""Runs whose loss and global gradient norm take a given course, and what one rule says of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding, Severity
from gradscope.analysis.rule import Rule
from gradscope.record import Run
from tests.analysis.synthetic import Builder, Chain

Array = NDArray[Any]
TWO_OPTIMIZERS: dict[str, Any] = {"coverage": {"optimizers": [{"type": "Adam"}, {"type": "Adam"}]}}


def finding_of(rule: Rule[Any], run: Run) -> Finding | None:
    report = analyze(run, rules=[rule])
    # A rule that fails is skipped in a report; in a test it must not hide.
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert len(report.findings) <= 1
    return report.findings[0] if report.findings else None


def found(rule: Rule[Any], run: Run) -> Finding:
    finding = finding_of(rule, run)
    assert finding is not None
    return finding


def level(rule: Rule[Any], run: Run) -> Severity | None:
    finding = finding_of(rule, run)
    return None if finding is None else finding.severity


def course(
    loss: Array, *, norms: Array | None = None, rates: Array | None = None, **meta: Any
) -> Builder:
    """A small chain of layers with these losses and global gradient norms."""
    builder = Chain(layers=2, steps=len(loss), meta=meta).builder()
    builder.scalars["loss"] = loss
    if norms is not None:
        # Of equal parts: four parameters.
        builder.arrays["parameters"]["grad_norm"][:] = norms[:, None] / 2
    if rates is not None:
        builder.scalars["learning_rate"] = rates
    return builder


def normal(steps: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=steps)


def exponential(steps: int, seed: int = 0) -> Array:
    """Losses as batches of one have them."""
    return np.random.default_rng(seed).exponential(size=steps)


def learned(steps: int, to: float = 0.3) -> Array:
    """A loss that falls within 40 steps, with some noise."""
    fall = to + (2.3 - to) * np.exp(-np.arange(steps) / 20)
    return np.asarray(fall * (1 + 0.1 * normal(steps)), dtype=np.float64)
