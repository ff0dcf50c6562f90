"""Runs and reports made by hand, of which everything is known."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.report import Report, Skipped
from gradscope.analysis.rule import Rule, rule
from gradscope.quantities import CATALOGUE, TableName
from gradscope.record import Entity, Run, Table

HOSTILE = "</script><img src=x onerror=alert(1)>[bold]|*_`\x1b[31m"

META: dict[str, Any] = {
    "model": "Sequential",
    "parameters": 12_345,
    "trainable_parameters": 12_000,
    "device": "cpu",
    "criterion": None,
    "cadence": "every 10th step",
    "level": "full",
    "loss_is_progress": True,
    "created": "2026-01-02 03:04:05 +0000",
    "versions": {"gradscope": "0.1.0", "torch": "2.6.0"},
    "log_dir": "runs/first",
    "format_version": 1,
    "coverage": {
        "modules": {"never_ran": ["unused"], "output_gradients_unseen": []},
        "optimizers": [{"type": "Adam", "lr": 0.001, "eps": float("inf")}],
        "loss_seen": False,
        "unfinished_step": False,
    },
    "problems": [{"part": "module outputs", "message": "module outputs disabled: a reason"}],
    "left_out": ["the last 12 bytes of a file"],
}


def table(
    name: TableName, entities: Sequence[Entity], steps: Sequence[int], **known: ArrayLike
) -> Table:
    """A table of the known quantities (steps × entities); the others were not measured."""
    quantities = tuple(quantity.name for quantity in CATALOGUE[name])
    values = np.full((len(quantities), len(steps), len(entities)), np.nan, np.float32)
    for quantity, given in known.items():
        values[quantities.index(quantity)] = given
    return Table(tuple(entities), np.array(steps, np.int64), quantities, values)


def parameter(name: str, depth: int = 0, group: str = "weight") -> Entity:
    return Entity(name, "parameter", (32, 8), 256, depth, group, "Linear")


def module(name: str, depth: int = 0, group: str = "linear") -> Entity:
    return Entity(name, "module", (16, 32), 512, depth, group, "Linear")


def run_of(
    norms: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    nonfinite: ArrayLike = 0,
    output_norms: ArrayLike | None = None,
    loss: ArrayLike | None = None,
    meta: Mapping[str, Any] = META,
) -> Run:
    """A run with these gradient norms (steps × layers), NaN where not measured."""
    grid = np.atleast_2d(np.asarray(norms, np.float32))
    names = names or [f"layers.{index}" for index in range(grid.shape[1])]
    steps = range(len(grid)) if steps is None else steps
    modules = [module(name, depth) for depth, name in enumerate(names)]
    parameters = [parameter(f"{name}.weight", depth) for depth, name in enumerate(names)]
    outputs = {} if output_norms is None else {"output_grad_norm": output_norms}
    scalars = {} if loss is None else {"loss": np.asarray(loss, np.float64)}
    known = {
        "grad_norm": grid,
        "grad_nonfinite": nonfinite,
        "grad_missing": np.isnan(nonfinite),
        "requires_grad": 1,
        "in_optimizer": 1,
    }
    return Run(
        table("parameters", parameters, steps, **known),
        table("modules", modules, steps, **outputs),
        table("signals", [], steps),
        np.array(steps, np.int64),
        scalars,
        meta,
    )


def empty_run() -> Run:
    """A run of which nothing was recorded."""
    return Run(
        table("parameters", [], []),
        table("modules", [], []),
        table("signals", [], []),
        np.array([], np.int64),
        {},
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Some limits."""

    ratio: float = 0.001
    least: float = float("-inf")


def rule_of(code: str, name: str) -> Rule[Any]:
    """A rule that finds nothing."""

    @rule(code, name=name, limits=Limits(), requires=("parameters.grad_norm",))
    def check(run: Run, limits: Limits) -> Iterator[Finding]:
        """A page.

        ## Why it matters
        Early layers learn nothing, so the later ones must make do with random features, which
        is what `nn.Linear` starts with.

        A second paragraph.

        ## How sure it is
        Certain that `grad_norm` fades; that it does harm is likely.

        ## References
        None.
        """
        del run, limits
        yield from ()

    return check


RULES = (
    rule_of("GS101", "vanishing-gradient"),
    rule_of("GS104", "poor-initialization"),
    rule_of("GS003", "zero-gradient"),
    rule_of("GS301", "dead-relu"),
)


def finding(
    code: str = "GS101",
    name: str = "vanishing-gradient",
    severity: Severity = Severity.ERROR,
    layer: str | None = "layers.0",
    message: str = "The gradient shrinks by 0.2 per layer.",
    **more: Any,
) -> Finding:
    return Finding(code, name, severity, layer, message, **more)


def report_of(
    run: Run, *findings: Finding, skipped: tuple[Skipped, ...] = (), rules: Any = RULES
) -> Report:
    return Report(run, findings, skipped, rules)


def sick_report() -> Report:
    """One of everything."""
    norms = np.geomspace(1e-6, 1, 4) * np.ones((30, 1))
    nonfinite = np.zeros((30, 4))
    nonfinite[12:, 2] = np.nan
    evidence = (
        Evidence("grad_norm first/last layer", "layers.0", 0, 290, 1.23456e-6, 0.001),
        Evidence("loss", None, 10, 290, float("nan")),
    )
    return report_of(
        run_of(norms, nonfinite=nonfinite, steps=range(0, 300, 10)),
        finding(
            "GS104",
            "poor-initialization",
            message="The weights start 5 times too small.",
            evidence=evidence,
            remedies=("Call `nn.init.kaiming_normal_` before training.", "Add nn.LayerNorm."),
        ),
        finding("GS999", "made-up", Severity.WARNING, None, "A rule that was not asked."),
        finding("GS301", "dead-relu", Severity.INFO, "layers.[1]", "3 of 32 units are dead."),
        finding(explained_by=("GS104",)),
        finding(
            "GS003",
            "zero-gradient",
            Severity.WARNING,
            "layers.0.weight",
            "Its gradient is exactly zero.",
            explained_by=("GS101",),
        ),
        skipped=(Skipped("GS301", "dead-relu", "not measured: modules.dead_unit_fraction"),),
    )
