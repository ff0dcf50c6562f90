"""That the pictures look as they did: pixels against tests/golden/figures/.

Fonts and canvas are matplotlib's own; other versions of it set letters a little differently.
"""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from gradscope.record import Run
from gradscope.reporters.figures import (
    DARK,
    LIGHT,
    Theme,
    gradient_by_depth,
    gradient_heatmap,
    gradient_magnitudes,
    loss_curve,
    update_ratio,
)
from gradscope.reporters.figures.canvas import rendered
from tests.conftest import GOLDEN
from tests.reporters.samples import run_of, table
from tests.reporters.trainings import counted, seen, with_magnitudes

# Of 255, root mean square over all pixels and channels. A moved line is above it, see below.
_TOLERANCE = 3.0
_DPI = 55
_MAX_BYTES = 40_000

STEPS = [*range(10), *range(10, 120, 10), *range(400, 500, 10)]
FINDINGS = (seen("GS101", 0, 490, "layers.0"), seen("GS401", 50, 110, "layers.5"))


def training(last: float = 1.0) -> Run:
    """Of a bit of everything; `last` scales the gradient of the last layer."""
    at, layer = np.array(STEPS)[:, None], np.arange(12)
    norms = 10 ** (layer / 3 - 4 + np.sin(at / 30 + layer) / 2)
    norms[:, -1] *= last
    norms[12:15, 3] = 0
    nonfinite = np.zeros_like(norms)
    nonfinite[20, 7] = 1
    ratios = 1e-3 * 10 ** np.sin(at / 40 + layer)
    ratios[:, 5] *= 1e4
    ratios[:, 2] *= 1e-4
    loss = 3 * np.exp(-np.array(STEPS) / 200) + np.sin(np.array(STEPS)) / 10
    run = run_of(norms, steps=STEPS, nonfinite=nonfinite, output_norms=norms, loss=loss)
    entities = run.parameters.entities
    known = {"grad_norm": norms, "grad_nonfinite": nonfinite, "update_ratio": ratios}
    powers = [{-8 - step // 60 + at: 10 - abs(at) for at in range(-9, 10)} for step in STEPS]
    measured = with_magnitudes(
        {entity.name: counted(*powers) for entity in entities}, steps=STEPS, zeros=0.1
    )
    known["grad_zero_fraction"] = np.full_like(norms, 0.1)
    parameters = table("parameters", entities, STEPS, **known)
    return replace(run, parameters=parameters, histograms=measured.histograms)


DRAW: dict[str, Callable[..., Figure]] = {
    "gradient_by_depth": gradient_by_depth,
    "gradient_heatmap": gradient_heatmap,
    "gradient_magnitudes": gradient_magnitudes,
    "loss_curve": loss_curve,
    "update_ratio": update_ratio,
}


def pixels(content: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)


def difference(one: bytes, other: bytes) -> float:
    """The root mean square of the difference; infinite between sizes."""
    left, right = pixels(one), pixels(other)
    if left.shape != right.shape:
        return float("inf")
    return float(np.sqrt(np.mean((left - right) ** 2)))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("name", DRAW)
def test_pictures_look_as_they_did(name: str, theme: Theme, request: pytest.FixtureRequest) -> None:
    made = rendered(DRAW[name](training(), theme=theme, findings=FINDINGS), dpi=_DPI)
    path = GOLDEN / "figures" / f"{name}-{theme.name}.png"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made)
    assert path.stat().st_size < _MAX_BYTES
    assert difference(made, path.read_bytes()) < _TOLERANCE, (
        "run pytest --update-golden, then look at the pictures"
    )


@pytest.mark.parametrize("name", ["gradient_by_depth", "gradient_heatmap"])
def test_another_gradient_in_one_layer_would_be_noticed(name: str) -> None:
    """The meta-test."""
    one, other = (rendered(DRAW[name](training(last)), dpi=_DPI) for last in (1.0, 1e-2))
    assert difference(one, other) > 2 * _TOLERANCE


def test_a_missing_bracket_would_be_noticed() -> None:
    with_one = rendered(loss_curve(training(), findings=FINDINGS[:1]), dpi=_DPI)
    moved = rendered(loss_curve(training(), findings=FINDINGS[1:]), dpi=_DPI)
    assert difference(with_one, moved) > _TOLERANCE
