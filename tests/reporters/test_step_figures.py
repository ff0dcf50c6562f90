"""That the pictures over the steps show what was measured: updates, magnitudes."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text

from gradscope.errors import ConfigError
from gradscope.reporters.figures import gradient_magnitudes, update_ratio
from tests.reporters.samples import empty_run, run_of
from tests.reporters.trainings import counted, seen, with_magnitudes, with_updates

WAVES = 10.0 ** (-3 + np.sin(np.arange(12)[:, None] + np.arange(9)) / 2)


def line(axes: Axes, label: str) -> Line2D:
    return next(line for line in axes.lines if line.get_label() == label)


def heights(axes: Axes, label: str) -> list[float]:
    return [float(y) for y in np.asarray(line(axes, label).get_ydata())]


def named(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text().startswith("layers")]


def image(axes: Axes, label: str) -> AxesImage:
    return next(image for image in axes.images if image.get_label() == label)


def shares(axes: Axes, label: str = "magnitudes") -> np.ndarray[Any, Any]:
    made = image(axes, label).get_array()
    assert isinstance(made, np.ma.MaskedArray)
    return made.filled(np.nan)


def test_updates_show_the_median_and_the_band_of_the_layers() -> None:
    axes = update_ratio(with_updates(WAVES)).axes[0]
    assert axes.get_yscale() == "log"
    logarithms = np.sort(np.log10(WAVES.astype(np.float32)), axis=1)
    np.testing.assert_allclose(heights(axes, "median layer"), 10 ** logarithms[:, 4], rtol=1e-5)
    # Of nine sorted values the 5th percentile lies 0.4 of the way from the first to the second.
    low = 10 ** (logarithms[:, 0] + 0.4 * (logarithms[:, 1] - logarithms[:, 0]))
    band = next(found for found in axes.collections if found.get_label() == "90 % of the layers")
    drawn = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert all(np.isclose(drawn, height, rtol=1e-5).any() for height in low)


def test_the_guide_is_where_layers_learn() -> None:
    axes = update_ratio(with_updates(WAVES)).axes[0]
    guide = next(found for found in axes.patches if found.get_label() == "where most layers learn")
    box = guide.get_path().get_extents(guide.get_patch_transform())
    assert (box.y0, box.y1) == pytest.approx((1e-4, 1e-1))
    assert set(heights(axes, "usual, 1e-3")) == {1e-3}


def test_biases_and_norms_set_no_standard() -> None:
    ratios = np.full((3, 7), 1e-3)
    ratios[:, :2] = 10
    axes = update_ratio(with_updates(ratios, groups=("bias", "norm"))).axes[0]
    np.testing.assert_allclose(heights(axes, "median layer"), 1e-3, rtol=1e-6)
    assert named(axes) == []


def test_the_worst_layers_are_named_those_with_findings_first() -> None:
    ratios = WAVES.copy()
    ratios[:, 2] *= 1e-5
    ratios[:, 5] *= 1e4
    axes = update_ratio(with_updates(ratios)).axes[0]
    assert named(axes) == ["layers.2.weight", "layers.5.weight"]
    np.testing.assert_allclose(heights(axes, "_layers.2.weight"), ratios[:, 2], rtol=1e-5)
    axes = update_ratio(with_updates(ratios), findings=[seen("GS401", 0, 3, "layers.7")]).axes[0]
    assert named(axes) == ["layers.7.weight", "layers.2.weight", "layers.5.weight"]


def test_few_layers_are_all_named_and_have_no_band() -> None:
    axes = update_ratio(with_updates(WAVES[:, :3])).axes[0]
    assert len(named(axes)) == 3
    assert "median layer" not in [line.get_label() for line in axes.lines]


def test_at_most_four_names() -> None:
    assert len(named(update_ratio(with_updates(WAVES * 1e-6)).axes[0])) == 4


def test_names_do_not_collide() -> None:
    figure = update_ratio(with_updates(np.full((5, 4), 1e-3)))
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("layers")]
    # Without the lines that lead to the names.
    boxes = sorted((box.y0, box.y1) for box in map(Text.get_window_extent, names))
    assert len(boxes) == 4
    # A box has some room above and below the letters.
    assert all(lower[1] <= upper[0] + 3 for lower, upper in pairwise(boxes))


def test_no_update_and_an_infinite_one_are_marked() -> None:
    ratios = WAVES.copy()
    ratios[3, :2] = 0
    ratios[7, 4] = np.inf
    axes = update_ratio(with_updates(ratios)).axes[0]
    marks = {
        str(found.get_label()): np.asarray(found.get_offsets())[:, 0].tolist()
        for found in axes.collections
        if "up to" in str(found.get_label())
    }
    assert marks == {
        "exactly zero in up to 2 of 9 layers": [3],
        "infinite in up to 1 of 9 layers": [7],
    }


def test_no_line_spans_a_pause() -> None:
    steps = [*range(6), *range(500, 506)]
    drawn = line(update_ratio(with_updates(WAVES, steps=steps)).axes[0], "median layer")
    x, y = np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())
    assert x[np.isnan(y)].tolist() == [252.5]


def test_without_updates_it_says_so() -> None:
    axes = update_ratio(run_of(np.ones((3, 2)))).axes[0]
    assert [text.get_text() for text in axes.texts] == ["No update was measured."]


def test_magnitudes_are_shares_of_all_entries_zeros_included() -> None:
    run = with_magnitudes({"a": counted({-3: 6, -5: 2}, {-4: 8})}, zeros=[[0.2], [0.0]])
    axes = gradient_magnitudes(run).axes[0]
    np.testing.assert_allclose(shares(axes), [[0.2, 0.0], [0.0, 1.0], [0.6, 0.0]], atol=1e-6)
    np.testing.assert_allclose(shares(axes, "zeros"), [[0.2, 0.0]], atol=1e-6)
    left, right, bottom, top = image(axes, "magnitudes").get_extent()
    # From 2**-5 to 2**-2, one column for each of the steps 0 and 1.
    assert (bottom, top) == pytest.approx((np.log10(1 / 32), np.log10(1 / 4)))
    assert (left, right) == (-0.5, 1.5)
    assert "zero" in [label.get_text() for label in axes.get_yticklabels()]


def test_parameters_weigh_by_their_size_not_by_how_many_entries_were_counted() -> None:
    run = with_magnitudes(
        {"a": counted({-3: 10}), "b": counted({-1: 5})},
        sizes={"a": 100, "b": 300},
        nonfinite=[[0, 150]],
    )
    made = shares(gradient_magnitudes(run).axes[0])
    # Half of b's entries are not finite, and in no bin.
    np.testing.assert_allclose(made[:, 0], [0.25, 0.0, 0.375])


def test_the_median_is_that_of_the_entries_that_are_not_zero() -> None:
    # Three of four in the upper bin: half of all lies a third of the way through it.
    run = with_magnitudes({"a": counted({-4: 1, -3: 3})}, zeros=0.5)
    [height] = heights(gradient_magnitudes(run).axes[0], "median, zeros left out")
    assert height == pytest.approx((-3 + 1 / 3) * np.log10(2))


def test_a_layer_is_a_parameter_or_a_module() -> None:
    run = with_magnitudes(
        {
            "net.1.weight": counted({-3: 1}),
            "net.1.bias": counted({-2: 1}),
            "net.10": counted({0: 1}),
        }
    )
    made = {
        layer: image(gradient_magnitudes(run, layer=layer).axes[0], "magnitudes").get_extent()[2:]
        for layer in ("net.1.weight", "net.1", "net", None)
    }
    exponents = {layer: np.round(np.array(e) / np.log10(2)).tolist() for layer, e in made.items()}
    assert exponents == {
        "net.1.weight": [-3, -2], "net.1": [-3, -1], "net": [-3, 1], None: [-3, 1],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"no histogram of 'net\.2'; did you mean 'net\.1'"):
        gradient_magnitudes(run, layer="net.2")


def test_only_findings_of_the_layer_are_marked() -> None:
    run = with_magnitudes({"a.weight": counted({-3: 1}), "b.weight": counted({-3: 1})})
    findings = [seen("GS101", 0, 0, "a"), seen("GS102", 0, 0, "b"), seen("GS501", 0, 0, None)]
    axes = gradient_magnitudes(run, layer="a.weight", findings=findings).axes[0]
    assert [t.get_text() for t in axes.texts if t.get_text().startswith("GS")] == ["GS501", "GS101"]


@pytest.mark.parametrize(
    ("powers", "said"),
    [
        ({-20: 1, 0: 1}, ["fp16: fewer digits below"]),
        ({-28: 1, 0: 1}, ["fp16: fewer digits below", "fp16: zero below"]),
        ({-3: 1, 0: 1}, []),
    ],
)
def test_the_limits_of_half_precision_are_shown_where_they_matter(
    powers: dict[int, int], said: list[str]
) -> None:
    axes = gradient_magnitudes(with_magnitudes({"a": counted(powers)})).axes[0]
    assert [text.get_text() for text in axes.texts] == said
    smallest_normal, smallest = (np.log10(limit) for limit in (6.103515625e-5, 5.9604645e-8))
    known = {"fp16: fewer digits below": smallest_normal, "fp16: zero below": smallest}
    for text in said:
        assert heights(axes, f"_{text}")[0] == pytest.approx(known[text])


def test_columns_of_several_steps_hold_their_mean_and_pauses_nothing() -> None:
    steps = [*range(0, 1000, 10), 30_000, 30_010, 30_020]
    powers = [{-3: 1}] * 100 + [{-2: 1}] * 3
    axes = gradient_magnitudes(with_magnitudes({"a": counted(*powers)}, steps=steps)).axes[0]
    made = shares(axes)
    assert made.shape == (2, 800)
    assert np.isnan(made[:, 400]).all()
    assert set(np.unique(made[:, ~np.isnan(made).any(axis=0)])) == {0, 1}


def test_all_zero_and_nothing_recorded() -> None:
    zero = gradient_magnitudes(with_magnitudes({"a": counted({}, {})}, zeros=1)).axes[0]
    np.testing.assert_array_equal(shares(zero, "zeros"), [[1, 1]])
    nothing = gradient_magnitudes(with_magnitudes({"a": counted({})}, zeros=np.nan)).axes[0]
    assert [text.get_text() for text in nothing.texts] == ["No gradient was measured."]
    none = gradient_magnitudes(empty_run()).axes[0]
    assert [t.get_text() for t in none.texts] == ["No histogram of magnitudes was recorded."]
