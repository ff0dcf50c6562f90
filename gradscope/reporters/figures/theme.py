"""How the pictures look, on light and on dark paper, whatever the user's matplotlib settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours. The marks differ in shape too: colour alone says nothing."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    hatch: str
    line: str
    first: str
    last: str
    zero: str
    nonfinite: str
    colormap: str


# Okabe and Ito's palette (2008), which people with any colour vision can tell apart; lighter
# twins of it on dark paper.
LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2127",
    muted="#5b6570",
    grid="#dde2e8",
    hatch="#b9c2cc",
    line="#0072b2",
    first="#8a5a00",
    last="#a0316f",
    zero="#000000",
    nonfinite="#d55e00",
    colormap="viridis",
)
DARK = Theme(
    name="dark",
    paper="#171b21",
    ink="#e6e9ed",
    muted="#9aa5b1",
    grid="#2f3741",
    hatch="#4a5562",
    line="#56b4e9",
    first="#e69f00",
    last="#e58bc0",
    zero="#000000",
    nonfinite="#ff7a2e",
    colormap="viridis",
)


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Within it figures are made and rendered in the theme."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "figure.facecolor": theme.paper,
                "axes.facecolor": theme.paper,
                "axes.edgecolor": theme.grid,
                "axes.labelcolor": theme.muted,
                "axes.titlecolor": theme.ink,
                "axes.titlelocation": "left",
                "axes.titlesize": 11,
                "axes.titleweight": "bold",
                "axes.labelsize": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": theme.grid,
                "grid.linewidth": 0.7,
                "hatch.color": theme.grid,
                "hatch.linewidth": 0.8,
                "figure.constrained_layout.h_pad": 0.09,
                "figure.constrained_layout.w_pad": 0.09,
                "legend.fontsize": 8.5,
                "legend.frameon": False,
                "legend.labelcolor": theme.muted,
                "text.color": theme.ink,
                "xtick.color": theme.muted,
                "ytick.color": theme.muted,
                "xtick.labelsize": 8.5,
                "ytick.labelsize": 8.5,
                # The names in an SVG stay text; its identifiers are the same each time.
                "svg.fonttype": "none",
                "svg.hashsalt": "gradscope",
                "font.sans-serif": ["DejaVu Sans"],
            }
        )
        yield
