"""How findings speak of numbers, layers and lists of names."""

import math
from collections.abc import Sequence

_LARGEST_INTEGER = 1e6
_LARGEST_PLAIN = 1e4
_THREE_DIGITS = 100
_SMALLEST_PLAIN = 1e-3


def number(value: float) -> str:
    """Three digits are enough to judge by."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    if value == int(value) and abs(value) < _LARGEST_INTEGER:
        return f"{int(value):,}"
    if _SMALLEST_PLAIN <= abs(value) < _LARGEST_PLAIN:
        return f"{value:,.0f}" if abs(value) >= _THREE_DIGITS else f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(amount: int, noun: str) -> str:
    """`1 rule`, `2 rules`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def share(value: float) -> str:
    """A share in percent, such that little is not nothing."""
    if 0 < value < 0.001:  # noqa: PLR2004  (what one decimal can't show)
        return "less than 0.1%"
    return f"{value:.0%}" if value == 0 or value >= 0.01 else f"{value:.1%}"  # noqa: PLR2004


def layer_in_words(name: str) -> str:
    """The name of a layer; in a Sequential it is a number, and reads like one."""
    return f"layer {name}" if name.isdigit() else name


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown
