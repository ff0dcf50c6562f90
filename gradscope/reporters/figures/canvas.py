"""Where a picture is drawn: on axes that the user brought, or on a figure of its own."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from gradscope.record import StepArray
from gradscope.reporters.figures.theme import LIGHT, Theme, drawing

WIDTH = 9.6  # inches
CSS_PIXELS_PER_INCH = 96
# Two pixels for each of a notebook's: sharp on today's screens.
_SHARPNESS = 2
_POINTS_PER_INCH = 72
_TITLE_PAD = 8.0  # points
_BELOW_LABEL = 34.0
_BAR_WIDTH = 0.15  # inches


class InlineFigure(Figure):
    """A figure that a notebook shows as the last line of a cell.

    It shows others only where pyplot made them, or was imported.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(size * CSS_PIXELS_PER_INCH) for size in self.get_size_inches())
        content = rendered(self, dpi=_SHARPNESS * CSS_PIXELS_PER_INCH)
        return content, {"width": width, "height": height}


def rendered(figure: Figure, *, dpi: float, colors: int | None = None) -> bytes:
    """The figure as PNG, the same each time; few colours take a third of the bytes."""
    content = io.BytesIO()
    with drawing(LIGHT), warnings.catch_warnings():
        # A name may have characters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        paper = figure.get_facecolor()
        figure.savefig(content, dpi=dpi, facecolor=paper, metadata={"Software": None})
    if colors is None:
        return content.getvalue()
    whole, small = Image.open(content).convert("RGB"), io.BytesIO()
    # An octree keeps colours that are rare, as that of NaN.
    whole.quantize(colors, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "png")
    return small.getvalue()


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes in inches."""
    figure = InlineFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


@contextmanager
def canvas(ax: Axes | None, height: float, theme: Theme, above: float = 0) -> Iterator[Axes]:
    """The user's axes, whose fonts and paper stay as they are, or those of a new figure.

    Its height is in inches, the room above the axes, for findings, in points.
    """
    if ax is not None:
        yield ax
        return
    with drawing(theme):
        yield new_figure(height + above / _POINTS_PER_INCH)[1]


def figure_of(axes: Axes) -> Figure:
    """The figure that holds the axes, also if within a subfigure."""
    figure: Figure = axes.figure.figure
    return figure


def size(axes: Axes) -> tuple[float, float]:
    """About how wide and high the axes are, in inches."""
    box = axes.get_window_extent()
    dpi = figure_of(axes).dpi
    return box.width / dpi, box.height / dpi


def titled(axes: Axes, title: str, above: float = 0) -> None:
    """Set the title, with this much room in points between it and the axes."""
    axes.set_title(title, pad=_TITLE_PAD + above)


def step_axis(axes: Axes, steps: StepArray | None = None) -> None:
    """Make the horizontal axis one of steps, from the first to the last."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if steps is not None:
        margin = max(1.0, 0.01 * float(steps[-1] - steps[0]))
        axes.set_xlim(float(steps[0]) - margin, float(steps[-1]) + margin)


def level_lines(axes: Axes, theme: Theme) -> None:
    """Faint lines behind the picture, by which to read heights."""
    axes.grid(visible=True, axis="y", c=theme.grid, lw=0.7)
    axes.set_axisbelow(True)


def colorbar(axes: Axes, image: AxesImage, *, own: bool) -> Colorbar:
    """A scale of the image's colours, as wide in each figure of one's own."""
    figure = figure_of(axes)
    aspect = size(axes)[1] / _BAR_WIDTH
    bar = (
        figure.colorbar(image, ax=axes, aspect=aspect, fraction=0.03, pad=0.015)
        if own
        else figure.colorbar(image, ax=axes)
    )
    bar.outline.set_linewidth(0)
    return bar


def legend(
    axes: Axes, *, own: bool, over: bool = True, handles: Sequence[Artist] | None = None
) -> None:
    """Add the legend if there is anything to explain: below a figure of one's own.

    Within a user's figure there may be something below: it is laid over the picture, or, where
    that would hide what is measured, right below the axes.
    """
    entries = axes.get_legend_handles_labels()[0] if handles is None else handles
    if not entries:
        return
    if own:
        figure_of(axes).legend(handles=entries, loc="outside lower left", ncols=len(entries))
    elif over:
        axes.legend(handles=entries, loc="best", fontsize="small")
    else:
        down = ScaledTranslation(
            0, -_BELOW_LABEL / _POINTS_PER_INCH, figure_of(axes).dpi_scale_trans
        )
        axes.legend(
            handles=entries, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0,
            bbox_transform=axes.transAxes + down, ncols=2, fontsize="small", frameon=False,
        )  # fmt: skip


def blank(said: str, theme: Theme, ax: Axes | None = None) -> Figure:
    """In place of a picture, why there is none."""
    with canvas(ax, 1.2, theme) as axes:
        axes.set_axis_off()
        axes.text(0.5, 0.5, said, ha="center", va="center", c=theme.muted, transform=axes.transAxes)
    return figure_of(axes)
