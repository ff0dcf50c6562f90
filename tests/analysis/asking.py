"""Asking one rule about one run, and loops and optimizers that runs are of."""

from typing import Any

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.finding import Finding
from gradscope.analysis.rule import Rule
from gradscope.record import Run
from tests.analysis.synthetic import WIDTH, Builder, Chain
from tests.analysis.test_unit_rules import LEARNING

LAYERS = 4


def said(run: Run, rule: Rule[Any]) -> Finding | None:
    report = analyze(run, rules=[rule])
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    assert len(report.findings) <= 1
    return report.findings[0] if report.findings else None


def reason(run: Run, rule: Rule[Any]) -> str:
    (skip,) = analyze(run, rules=[rule]).skipped
    return skip.reason


def loop(steps: int = 60, loss: tuple[float, float] = (2.3, 1.8), **meta: Any) -> Builder:
    return Chain(layers=LAYERS, steps=steps, loss=loss, meta=meta).builder()


def trained_by(**optimizer: Any) -> dict[str, Any]:
    return {"coverage": {"optimizers": [{"type": "SGD", **optimizer}]}}


def steps_of(
    steps: int = 100, loss: tuple[float, float] = LEARNING, rate: object = 1e-3, **optimizer: Any
) -> Builder:
    """Four layers, trained by Adam unless said."""
    meta = trained_by(**{"type": "Adam", "eps": 1e-8, **optimizer})
    builder = Chain(layers=LAYERS, steps=steps, loss=loss, meta=meta).builder()
    builder.scalars["learning_rate"][:] = rate
    builder.arrays["parameters"]["grad_rms"][:] = 0.1 / WIDTH
    builder.arrays["parameters"]["update_lost_fraction"][:] = 0.0
    return builder


def weights(builder: Builder) -> list[str]:
    names = (entity.name for entity in builder.entities["parameters"])
    return [name for name in names if name.endswith("weight")]


def unmoved(builder: Builder, *names: str, lost: object = 1.0) -> Builder:
    """Steps leave these as they are (or this share of their entries)."""
    for name in names:
        builder.set("parameters", "update_lost_fraction", name, lost)
        if lost == 1:
            for quantity in ("update_norm", "update_ratio"):
                builder.set("parameters", quantity, name, 0.0)
            builder.set("parameters", "weight_norm", name, 11.0)
    return builder
