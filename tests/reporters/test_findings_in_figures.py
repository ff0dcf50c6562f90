"""That findings are marked where they are: by layer, by step, with their code."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gradscope.analysis.finding import Severity
from gradscope.record import Run
from gradscope.reporters.figures import (
    DARK,
    gradient_by_depth,
    gradient_heatmap,
    gradient_magnitudes,
    loss_curve,
    update_ratio,
)
from gradscope.reporters.figures.canvas import rendered
from tests.reporters.samples import HOSTILE, empty_run, finding, run_of
from tests.reporters.trainings import counted, seen, with_magnitudes, with_updates

STEPS = range(0, 300, 10)
RUN = run_of(
    np.ones((30, 6)), steps=STEPS, output_norms=np.ones((30, 6)), loss=np.linspace(2, 1, 30)
)
OVER_STEPS: dict[str, tuple[Callable[..., Figure], Run]] = {
    "heatmap": (gradient_heatmap, RUN),
    "loss": (loss_curve, RUN),
    "updates": (update_ratio, with_updates(np.full((30, 6), 1e-3), steps=STEPS)),
    "magnitudes": (
        gradient_magnitudes,
        with_magnitudes({"a": counted(*[{-3: 1}] * 30)}, steps=STEPS),
    ),
}
ALL = {**OVER_STEPS, "depth": (gradient_by_depth, RUN)}


def bracket_lines(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_label() == "_finding"]


def brackets(axes: Axes) -> list[tuple[float, float]]:
    ends = (np.asarray(line.get_xdata(), float).tolist() for line in bracket_lines(axes))
    return [(first, last) for first, last in ends]


def codes(axes: Axes) -> list[str]:
    """From the top down."""
    texts = [text for text in axes.texts if text.get_fontweight() == "bold"]
    return [t.get_text() for t in sorted(texts, key=lambda t: -float(t.xyann[1]))]  # type: ignore[attr-defined]


def frames(axes: Axes) -> list[tuple[float, float, float, float]]:
    found = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_label() == "_finding"]
    return [
        (p.get_x(), p.get_x() + p.get_width(), p.get_y(), p.get_y() + p.get_height()) for p in found
    ]


@pytest.mark.parametrize(("draw", "run"), OVER_STEPS.values(), ids=OVER_STEPS)
def test_brackets_span_the_steps_of_the_evidence(draw: Callable[..., Figure], run: Run) -> None:
    findings = [
        seen("GS101", 100, 200, None),
        seen("GS003", 50, 50, None, Severity.WARNING),
        seen("GS301", 0, 290, None, Severity.INFO),
    ]
    axes = draw(run, findings=findings).axes[0]
    assert codes(axes) == ["GS101", "GS003"]
    assert sorted(brackets(axes)) == [(50, 50), (100, 200)]
    assert {line.get_marker() for line in bracket_lines(axes)} == {"|"}


def test_brackets_are_above_the_axes_and_below_the_title() -> None:
    figure = loss_curve(RUN, findings=[seen("GS101", 0, 290), seen("GS102", 0, 10)])
    rendered(figure, dpi=100)
    axes = figure.axes[0]
    top = axes.get_window_extent().y1
    drawn = [line.get_window_extent() for line in bracket_lines(axes)]
    title = axes.get_title(loc="left")
    assert title == "Loss"
    words = next(t for t in (axes.title, axes._left_title) if t.get_text() == title)  # type: ignore[attr-defined]
    assert all(top < box.y0 and box.y1 < words.get_window_extent().y0 for box in drawn)


def test_of_one_code_stretches_that_overlap_are_one() -> None:
    spans = [(0, 50), (40, 90), (200, 210), (60, 70)]
    axes = loss_curve(RUN, findings=[seen("GS201", *span) for span in spans]).axes[0]
    assert codes(axes) == ["GS201"]
    assert brackets(axes) == [(0, 90), (200, 210)]


def test_of_many_codes_the_last_share_a_lane() -> None:
    findings = [seen(f"GS10{number}", 10 * number, 10 * number) for number in range(7)]
    axes = loss_curve(RUN, findings=findings).axes[0]
    assert codes(axes) == ["GS100", "GS101", "GS102", "4 more"]
    assert len(brackets(axes)) == 7


def test_brackets_stay_within_the_axes() -> None:
    axes = gradient_heatmap(RUN, findings=[seen("GS501", -50, 10_000)]).axes[0]
    assert brackets(axes) == [axes.get_xlim()]


def test_without_evidence_there_is_no_bracket_but_a_name() -> None:
    axes = gradient_heatmap(RUN, findings=[finding(layer="layers.2")]).axes[0]
    assert brackets(axes) == []
    assert "▸ layers.2.weight" in [label.get_text() for label in axes.get_yticklabels()]


def test_by_depth_brackets_span_neighbouring_layers() -> None:
    found = [finding(layer=f"layers.{index}") for index in (1, 2, 5)]
    axes = gradient_by_depth(RUN, findings=found).axes[0]
    assert codes(axes) == ["GS101"]
    np.testing.assert_allclose(brackets(axes), [(0.7, 2.3), (4.7, 5.3)])


def test_the_heatmap_frames_rows_and_steps() -> None:
    found = [
        seen("GS101", 50, 90, "layers.1"),
        seen("GS101", 50, 90, "layers.2"),
        seen("GS3", 0, 290, "layers.4"),
    ]
    framed = frames(gradient_heatmap(RUN, findings=found).axes[0])
    assert sorted(framed) == [(-0.5, 290.5, 3.5, 4.5), (49.5, 90.5, 0.5, 2.5)]


def test_a_long_pause_is_not_painted() -> None:
    steps = [*range(0, 100, 10), *range(1000, 1100, 10)]
    figure = gradient_heatmap(run_of(np.ones((20, 2)), steps=steps))
    [pause] = [patch for patch in figure.axes[0].patches if patch.get_label() == "_pause"]
    assert isinstance(pause, Rectangle)
    # Usually a step reaches five steps far.
    assert (pause.get_x(), pause.get_x() + pause.get_width()) == pytest.approx((95, 995))
    image = next(i for i in figure.axes[0].images if i.get_label() == "norm")
    made = image.get_array()
    assert isinstance(made, np.ma.MaskedArray)
    assert np.ma.getmaskarray(made)[0].tolist() == [False] * 10 + [True] * 90 + [False] * 10
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["no step recorded"]


@pytest.mark.parametrize("steps", [[0, 500], [*range(10), *range(10, 200, 10)], [3], [0, 1, 3, 6]])
def test_the_usual_cadence_has_no_pause(steps: list[int]) -> None:
    figure = gradient_heatmap(run_of(np.ones((len(steps), 2)), steps=steps))
    assert not [patch for patch in figure.axes[0].patches if patch.get_label() == "_pause"]


def test_of_very_many_layers_the_unusual_ones_have_rows() -> None:
    waves = np.sin(np.arange(20)[:, None] + np.arange(1300)) / 10
    norms, nonfinite = 10**waves, np.zeros((20, 1300))
    norms[7, 101] = 1e9
    norms[8, 202] = 0
    nonfinite[9, 303] = 1
    run = run_of(norms, nonfinite=nonfinite)
    axes = gradient_heatmap(run, findings=[finding(layer="layers.405")]).axes[0]
    image = next(image for image in axes.images if image.get_label() == "norm")
    made = image.get_array()
    assert isinstance(made, np.ma.MaskedArray)
    # One of each four: 1300 / 400 rounded up.
    assert made.shape == (325, 20)
    assert axes.get_ylabel() == "325 of 1,300 layers: of each 4 the most unusual"
    assert made[101 // 4].max() == pytest.approx(9)
    marks = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert marks == {"exactly zero": [202 // 4], "NaN or infinite": [303 // 4]}
    assert "▸ layers.405.weight" in [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(("draw", "run"), ALL.values(), ids=ALL)
def test_axes_of_the_user_keep_their_look(draw: Callable[..., Figure], run: Run) -> None:
    with mpl.rc_context({"axes.facecolor": "pink", "font.size": 7}):
        before = dict(mpl.rcParams)
        figure = Figure()
        FigureCanvasAgg(figure)
        axes, other = figure.subplots(1, 2)
        assert draw(run, ax=axes, theme=DARK, findings=[seen("GS101", 0, 50)]) is figure
        assert dict(mpl.rcParams) == before
    assert axes.get_facecolor() == mpl.colors.to_rgba("pink")
    assert axes.title.get_fontsize() == pytest.approx(7 * 1.2)
    assert axes.has_data()
    assert not other.has_data()
    assert not figure.legends
    axes.set_title("mine")
    assert [t.get_text() for t in (axes.title, axes._left_title, axes._right_title)] == [
        "mine",
        "",
        "",
    ]
    assert rendered(figure, dpi=50).startswith(b"\x89PNG")


@pytest.mark.parametrize(("draw", "run"), ALL.values(), ids=ALL)
def test_a_subfigure_will_do(draw: Callable[..., Figure], run: Run) -> None:
    figure = Figure(layout="constrained")
    part = figure.subfigures()
    assert isinstance(part, SubFigure)
    assert draw(run, ax=part.subplots(), findings=[seen("GS101", 0, 50)]) is figure
    assert rendered(figure, dpi=50).startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", [draw for draw, _ in ALL.values()], ids=ALL)
def test_in_axes_of_the_user_too_it_says_why_there_is_no_picture(
    draw: Callable[..., Figure],
) -> None:
    axes = Figure().subplots()
    draw(empty_run(), ax=axes)
    assert len(axes.texts) == 1


def test_names_are_not_formulas_even_where_tex_sets_everything() -> None:
    run = run_of(np.ones((3, 2)), names=["$x_1$ \\frac", HOSTILE], output_norms=np.ones((3, 2)))
    with mpl.rc_context({"text.usetex": True}):
        axes = Figure().subplots()
        gradient_heatmap(run, ax=axes)
    assert not any(label.get_usetex() for label in axes.get_yticklabels())
    assert "$x_1$ \\frac.weight" in [label.get_text() for label in axes.get_yticklabels()]
