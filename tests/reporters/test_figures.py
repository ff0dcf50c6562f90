"""That the pictures show what the arrays hold."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from gradscope.analysis.finding import Severity
from gradscope.record import Run, Table
from gradscope.reporters.figures import (
    DARK,
    LIGHT,
    Theme,
    gradient_by_depth,
    gradient_heatmap,
    loss_curve,
)
from gradscope.reporters.figures.labels import elided, shown_rows
from gradscope.reporters.figures.theme import drawing
from tests.reporters.samples import empty_run, finding, parameter, run_of, table


def image(figure: Figure, label: str = "norm") -> AxesImage:
    return next(image for image in figure.axes[0].images if image.get_label() == label)


def array(figure: Figure, label: str = "norm") -> np.ma.MaskedArray[Any, Any]:
    made = image(figure, label).get_array()
    assert isinstance(made, np.ma.MaskedArray)
    return made


def line(axes: Axes, label: str) -> Line2D:
    return next(line for line in axes.lines if line.get_label() == label)


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    drawn = line(axes, label)
    return list(zip(np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata()), strict=True))


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def rendered(figure: Figure, theme: Theme = LIGHT) -> bytes:
    with drawing(theme):
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def with_parameters(parameters: Table) -> Run:
    other = run_of([[1.0]])
    return Run(parameters, other.modules, other.signals, other.steps, {})


def marks(axes: Axes, label: str) -> list[float]:
    """Where along the horizontal axis the marks of this label stand."""
    found = next(found for found in axes.collections if found.get_label() == label)
    return [float(x) for x in np.asarray(found.get_offsets())[:, 0]]


def long_run() -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(0).normal(0, 0.1, (5000, 3))
    return np.exp(noise)


def test_the_heatmap_holds_the_norms() -> None:
    norms = np.array([[1, 10, 100], [1e-3, 1e-2, 1e-1]])
    figure = gradient_heatmap(run_of(norms, steps=(0, 10)))
    np.testing.assert_allclose(array(figure), [[0, -3], [1, -2], [2, -1]], rtol=1e-6)


def test_the_first_layer_is_on_top() -> None:
    entities = [parameter("late", 1), parameter("early", 0)]
    parameters = table("parameters", entities, (0,), grad_norm=[[1, 100]], grad_nonfinite=0)
    run = with_parameters(parameters)
    axes = gradient_heatmap(run).axes[0]
    assert labels(axes) == ["early", "late"]
    assert axes.get_ylim() == (1.5, -0.5)
    np.testing.assert_allclose(array(gradient_heatmap(run))[:, 0], [2, 0])


def test_steps_stand_at_their_real_positions() -> None:
    # Ten dense steps, then every tenth; the last of them is different.
    steps = [*range(10), *range(10, 101, 10)]
    norms = np.ones((len(steps), 1))
    norms[-1] = 1000
    drawn = gradient_heatmap(run_of(norms, steps=steps))
    assert list(image(drawn).get_extent()) == [-0.5, 100.5, 0.5, -0.5]
    row = array(drawn)[0]
    assert len(row) == 101
    assert row[96:].tolist() == [3] * 5
    assert row[:95].max() == 0


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_a_one_step_event_among_5000_stays_the_extreme(factor: float) -> None:
    norms = long_run()
    norms[2501, 1] *= factor
    drawn = gradient_heatmap(run_of(norms))
    pooled = array(drawn)
    assert pooled.shape == (3, 800)
    expected = np.log10(norms[2501, 1])
    extreme = pooled.max() if factor > 1 else pooled.min()
    assert extreme == pytest.approx(expected, rel=1e-5)
    row, column = np.argwhere(pooled == extreme)[0]
    left, right, _, _ = image(drawn).get_extent()
    width = (right - left) / 800
    assert row == 1
    assert left + column * width <= 2501 <= left + (column + 1) * width
    assert image(drawn).norm.vmax >= pooled.max()
    assert image(drawn).norm.vmin <= pooled.min()


def test_zero_and_nonfinite_and_not_measured_have_marks_of_their_own() -> None:
    norms = np.ones((6, 4))
    norms[1, 0] = 0
    norms[2, 1] = np.nan
    nonfinite = np.zeros((6, 4))
    nonfinite[3, 2] = 5
    norms[4, 3] = np.inf
    figure = gradient_heatmap(run_of(norms, nonfinite=nonfinite))
    axes = figure.axes[0]
    assert points(axes, "exactly zero") == [(1, 0)]
    assert points(axes, "NaN or infinite") == [(3, 2), (4, 3)]
    assert line(axes, "exactly zero").get_marker() != line(axes, "NaN or infinite").get_marker()

    codes = array(figure, "marks").filled(-1)
    expected = np.full((4, 6), -1)
    expected[0, 1], expected[2, 3], expected[3, 4] = 0, 1, 1
    np.testing.assert_array_equal(codes, expected)
    assert np.argwhere(np.ma.getmaskarray(array(figure))).tolist() == [[0, 1], [1, 2], [3, 4]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["exactly zero", "NaN or infinite", "not measured"]


def test_only_what_is_there_is_in_the_legend() -> None:
    assert not gradient_heatmap(run_of(np.ones((3, 3)))).legends


def test_a_one_step_nonfinite_or_zero_among_5000_is_marked_where_it_was() -> None:
    norms, nonfinite = long_run(), np.zeros((5000, 3))
    nonfinite[1234, 2] = 1
    norms[4321, 0] = 0
    axes = gradient_heatmap(run_of(norms, nonfinite=nonfinite)).axes[0]
    [(x, y)] = points(axes, "NaN or infinite")
    assert (abs(x - 1234) < 5000 / 800, y) == (True, 2)
    [(x, y)] = points(axes, "exactly zero")
    assert (abs(x - 4321) < 5000 / 800, y) == (True, 0)


def test_layers_with_findings_are_marked() -> None:
    run = run_of(np.ones((2, 3)), output_norms=np.ones((2, 3)))
    found = [
        finding(layer="layers.1"),
        finding(layer="layers.2", severity=Severity.INFO),
        finding(layer="layers"[:-1]),
    ]
    axes = gradient_heatmap(run, findings=found).axes[0]
    assert labels(axes) == ["layers.0.weight", "▸ layers.1.weight", "layers.2.weight"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()][1] == "bold"
    ticks = gradient_by_depth(run, findings=found).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["layers.0", "▸ layers.1", "layers.2"]


def test_of_500_layers_the_marked_one_has_its_name() -> None:
    run = run_of(np.ones((2, 500)), output_norms=np.ones((2, 500)))
    found = [finding(layer="layers.333")]
    axes = gradient_heatmap(run, findings=found).axes[0]
    assert "▸ layers.333.weight" in labels(axes)
    assert len(labels(axes)) < 60
    ticks = gradient_by_depth(run, findings=found).axes[0].get_xticklabels()
    assert "▸ layers.333" in [tick.get_text() for tick in ticks]
    assert "250 of 500 layers" in gradient_heatmap(run).axes[0].get_ylabel()


def test_biases_are_left_out_where_there_are_many() -> None:
    def run(layers: int) -> Run:
        entities = [
            parameter(f"{index}.{leaf}", 2 * index + bias, leaf)
            for index in range(layers)
            for bias, leaf in enumerate(("weight", "bias"))
        ]
        return with_parameters(table("parameters", entities, (0,), grad_norm=1, grad_nonfinite=0))

    assert array(gradient_heatmap(run(5))).shape[0] == 10
    assert array(gradient_heatmap(run(50))).shape[0] == 50


def test_depth_shows_the_quantiles_and_the_first_and_last_step() -> None:
    outputs = np.geomspace(1e-4, 1, 5) * np.arange(1, 12)[:, None]
    figure = gradient_by_depth(run_of(np.ones((11, 5)), output_norms=outputs))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    drawn = {text: np.asarray(line(axes, text).get_ydata()) for text in ("step 0", "step 10")}
    median = np.asarray(line(axes, "median step").get_ydata())
    np.testing.assert_allclose(drawn["step 0"], outputs[0], rtol=1e-6)
    np.testing.assert_allclose(drawn["step 10"], outputs[10], rtol=1e-6)
    np.testing.assert_allclose(median, np.median(outputs, axis=0), rtol=1e-6)
    band = axes.collections[0].get_paths()[0].vertices
    for quantile in (0.1, 0.9):
        at_first = np.quantile(outputs[:, 0], quantile)
        assert np.isclose(np.asarray(band)[:, 1], at_first).any()


def test_without_outputs_depth_shows_the_weights() -> None:
    axes = gradient_by_depth(run_of([[1, 2, 3]])).axes[0]
    np.testing.assert_allclose(np.asarray(line(axes, "step 0").get_ydata()), [1, 2, 3])
    assert "weight" in axes.get_title(loc="left")


def test_depth_marks_what_a_logarithm_can_not_show() -> None:
    outputs = np.ones((3, 4))
    outputs[1, 2] = 0
    outputs[2, 3] = np.inf
    axes = gradient_by_depth(run_of(np.ones((3, 4)), output_norms=outputs)).axes[0]
    assert marks(axes, "exactly zero at some step") == [2]
    assert marks(axes, "NaN or infinite at some step") == [3]


def test_the_loss_and_where_it_is_not_finite() -> None:
    loss = [2.0, np.nan, 1.0, np.inf, np.nan]
    run = run_of(np.ones((5, 1)), loss=loss)
    flags = {"loss_nonfinite": np.array([0, 0, 0, 1, 1.0])}
    run = Run(
        run.parameters, run.modules, run.signals, run.steps, {**run.scalars, **flags}, run.meta
    )
    axes = loss_curve(run).axes[0]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [2, 1]
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [0, 2]
    assert marks(axes, "NaN or infinite") == [3, 4]


ODD = {
    "one step": run_of([[1, 2, 3]], output_norms=[[1, 2, 3]], loss=[1.0]),
    "one layer": run_of(np.ones((9, 1)), output_norms=np.ones((9, 1)), loss=np.ones(9)),
    "one number": run_of([[1.0]], loss=[np.nan]),
    "all NaN": run_of(np.full((3, 3), np.nan)),
    "all non-finite": run_of(np.full((3, 3), np.nan), nonfinite=1, loss=np.full(3, np.inf)),
    "all zero": run_of(np.zeros((3, 3)), output_norms=np.zeros((3, 3)), loss=np.zeros(3)),
    "all infinite": run_of(np.full((3, 3), np.inf), output_norms=np.full((3, 3), np.inf)),
    "some NaN": run_of([[1, np.nan], [np.nan, np.nan]], output_norms=[[np.nan, 1], [1, np.nan]]),
    "many layers": run_of(np.ones((2, 500)), output_norms=np.ones((2, 500))),
    "extreme": run_of([[1e-38, 3e38], [1e-45, 1]], loss=[1e-38, 3e38]),
    "long and odd names": run_of(
        [[1, 2, 3]], names=["a" * 80, "$x_1$ \\frac", "\x1b[31m" + "b." * 40]
    ),
    "empty": empty_run(),
}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("run", ODD.values(), ids=ODD)
def test_odd_runs_have_pictures(run: Run, theme: Theme) -> None:
    found = [finding(layer=entity.name) for entity in run.parameters.entities]
    for figure in (
        gradient_heatmap(run, theme=theme, findings=found),
        gradient_by_depth(run, theme=theme, findings=found),
        loss_curve(run, theme=theme),
    ):
        assert rendered(figure, theme).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("run", "said"),
    [(ODD["empty"], "Nothing was recorded."), (ODD["all NaN"], "No gradient was measured.")],
)
def test_no_picture_says_why(run: Run, said: str) -> None:
    for draw in (gradient_heatmap, gradient_by_depth):
        assert [text.get_text() for text in draw(run).axes[0].texts] == [said]


def test_the_settings_of_the_user_are_neither_used_nor_changed() -> None:
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        figure = gradient_heatmap(ODD["one step"])
        rendered(figure)
        assert dict(mpl.rcParams) == before
    assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)


def test_names_get_shorter_but_keep_their_numbers() -> None:
    assert elided("short", 10) == "short"
    name = "transformer.encoder.layers.17.self_attention.output_projection.weight"
    assert elided(name, 60) == "t.encoder.layers.17.self_attention.output_projection.weight"
    assert elided(name, 32) == "t.e.l.17.sa.op.weight"
    assert elided("layer4.1.conv2.weight", 16) == "l4.1.c2.weight"
    assert elided("layer4.1.conv2.weight", 9) == "l4.1.c2.w"
    assert elided("a" * 50 + "z" * 50, 13) == "aaaa…zzzzzzzz"


def test_names_never_run_into_one_another() -> None:
    shown = shown_rows(500, [7, 8, 250], 40)
    assert {7, 250} <= set(shown)
    assert len(shown) <= 40
    assert min(np.diff(shown)) >= 500 / 40
    assert shown_rows(5, [], 40) == [0, 1, 2, 3, 4]
