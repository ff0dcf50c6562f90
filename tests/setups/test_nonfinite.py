"""NaN at step 3: earlier numbers stay, what comes is counted, the report names the step."""

from pathlib import Path

import numpy as np
import pytest
from torch.optim import SGD

from gradscope.analysis.analyzer import analyze
from gradscope.log.reader import load
from tests.capture.trainings import mlp_model
from tests.setups.reference_loops import (
    STEPS,
    Loop,
    assert_passed,
    assert_received,
    followed,
    loss_of,
)
from tests.setups.support import support

SPOILT = 3


def spoilt(factor: float) -> Loop:
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss * factor if number == SPOILT else loss).backward()
        optimizer.step()

    return Loop(model, [optimizer], body)


@support(
    "Loops",
    "NaN or infinity at a step: counted, left out of the other numbers",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted_from_its_step_on(factor: float, tmp_path: Path) -> None:
    loop = followed(lambda: spoilt(factor), tmp_path)
    run = loop.run
    assert_received(run.parameters, loop.received)
    assert_passed(run.modules, loop.passed)
    nonfinite = run.parameters["grad_nonfinite"]
    assert (nonfinite[:SPOILT] == 0).all()
    assert (nonfinite[SPOILT:] > 0).all()
    assert run.meta["problems"] == []


def test_report_of_the_log_names_the_step(tmp_path: Path) -> None:
    followed(lambda: spoilt(float("nan")), tmp_path)
    run = load(tmp_path)
    assert len(run.steps) == STEPS
    lead = analyze(run).findings[0]
    assert lead.code == "GS503"
    assert lead.severity.value == "error"
    assert f"step {SPOILT}" in lead.message
    assert np.isfinite(run.parameters["weight_norm"][: SPOILT + 1]).all()
