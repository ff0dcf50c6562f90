"""Runs with everything that has a picture, and reports on them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.finding import Evidence
from gradscope.analysis.report import Report
from gradscope.record import Histograms, Run, pack_counts
from tests.reporters.samples import META, finding, module, parameter, report_of, table

F64 = NDArray[np.float64]


def whole_run(norms: F64, *, nonfinite: Any = 0, folder: str = "first", names: Any = None) -> Run:
    """A run with these gradient norms (steps × layers), and other quantities that follow them."""
    steps, layers = norms.shape
    names = names or [f"stage{index // 4}.layer{index}" for index in range(layers)]
    parameters = [parameter(f"{name}.weight", depth) for depth, name in enumerate(names)]
    modules = [module(name, depth) for depth, name in enumerate(names)]
    shares = np.linspace(0, 1, steps)[:, None] * np.ones((1, layers))
    counts = np.zeros((layers, 128), np.uint32)
    counts[np.arange(layers), 80 + np.arange(layers) % 20] = 100
    counts[np.arange(layers), 81 + np.arange(layers) % 20] = 50
    return Run(
        table(
            "parameters",
            parameters,
            range(steps),
            grad_norm=norms,
            grad_nonfinite=nonfinite,
            update_ratio=norms / 100,
            weight_norm=1.0,
        ),
        table(
            "modules",
            modules,
            range(steps),
            output_grad_norm=norms,
            output_grad_nonfinite=nonfinite,
            dead_unit_fraction=shares,
        ),
        table("signals", [], range(steps)),
        np.arange(steps),
        {"loss": np.linspace(2, 1, steps), "loss_nonfinite": np.zeros(steps)},
        {**META, "log_dir": f"runs/{folder}"},
        Histograms(tuple(parameters), np.arange(steps), -112, 128, (pack_counts(counts),) * steps),
    )


def noise(steps: int, layers: int, seed: int = 0) -> F64:
    """Norms around a hundredth, each layer at a level of its own."""
    random = np.random.default_rng(seed)
    return np.exp(random.normal(0, 0.3, (steps, layers)) + np.linspace(-6, -3, layers))


def marked_report(run: Run, row: int = 1) -> Report:
    """A report with an error at a layer, from the second quarter of the run on."""
    steps = run.recorded_steps
    name = run.parameters.names[row]
    first, last = int(steps[len(steps) // 4]), int(steps[len(steps) // 2])
    evidence = (Evidence("grad_norm", name, first, last, 0.5, 0.1),)
    return report_of(run, finding(layer=name.removesuffix(".weight"), evidence=evidence))
