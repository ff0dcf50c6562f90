"""A comparison's pictures: what is drawn, not how."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from gradscope.comparison import figures
from gradscope.comparison.ranking import ranked
from gradscope.comparison.result import Cell, Comparison, Name
from gradscope.errors import ConfigError


@pytest.fixture
def comparison() -> Comparison:
    cells = [
        Cell(
            Name(initialization, "tanh"),
            seed,
            gradient=np.linspace(slope / 2 * 5, 0, 6),
            slope=slope,
            weight_variance=variance,
            bias_variance=0.0,
            failure=failure,
        )
        for initialization, slope, variance, failure in (
            ("xavier_uniform", -0.2, 1.0, None),
            ("kaiming_normal", 0.4, 2.0, None),
            ("constant", 0.0, 0.1, "all units are copies"),
        )
        for seed in (0, 1)
    ]
    theory = {"xavier_uniform": -0.2}
    configurations = ranked(
        cells, {}, lambda name, _: (theory.get(name.initialization, math.nan), "")
    )
    return Comparison("Net", configurations, tuple("abcdef"), (0, 1))


def test_the_heatmap_says_decades_and_marks_what_fails(comparison: Comparison) -> None:
    (axes,) = figures.heatmap(comparison).axes
    written = {text.get_text() for text in axes.texts}
    assert written == {f"{-0.2 * 5 / (2 * math.log(10)):+.1f}", "+0.4", "×"}
    (image,) = axes.images
    shown = image.get_array()
    assert shown is not None
    assert int(np.ma.getmaskarray(shown).sum() + np.isnan(np.asarray(shown)).sum()) >= 1


def test_lines_are_relative_to_the_last_layer_and_theory_lies_on_its_slope(
    comparison: Comparison,
) -> None:
    names = (Name("xavier_uniform", "tanh"),)
    (axes,) = figures.gradient_by_depth(comparison, names=names).axes
    measured, theory = axes.lines
    drawn = np.asarray(measured.get_ydata(), np.float64)
    assert drawn == pytest.approx(np.exp(-0.1 * np.arange(5, -1, -1)))
    # Measured and predicted slopes are equal here, so that the lines meet.
    assert np.asarray(theory.get_ydata(), np.float64) == pytest.approx(drawn[1:-1])
    with pytest.raises(ConfigError, match="was not compared"):
        figures.gradient_by_depth(comparison, names=(Name("lsuv"),))


def test_the_phase_diagram_has_tanhs_line_and_the_models_places(comparison: Comparison) -> None:
    (axes,) = figures.phase_diagram(comparison, "tanh").axes
    line, *places = axes.lines
    # On it for tanh: (1, 0), and (3.44321, 1), of Schoenholz et al.'s line.
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert (x[0], y[0]) == pytest.approx((1, 0), abs=1e-6)
    assert (x[-1], y[-1]) == pytest.approx((3.44321, 1), abs=1e-4)
    assert {float(np.asarray(p.get_xdata())[0]) for p in places} == {1.0, 2.0, 0.1}


def test_axes_of_the_users_are_drawn_into(comparison: Comparison) -> None:
    figure = Figure()
    axes = figure.subplots()
    assert figures.heatmap(comparison, axes) is figure


def test_a_layer_without_gradient_is_left_out_of_its_line() -> None:
    cells = [
        Cell(Name("dead", "relu"), seed, gradient=np.array([-np.inf, 0.1, 0.2, 0.0]), slope=0.1)
        for seed in (0, 1)
    ]
    made = ranked(cells, {}, lambda *_: (math.nan, ""))
    (axes,) = figures.gradient_by_depth(Comparison("Net", made, tuple("abcd"), (0, 1))).axes
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 3, 4]
