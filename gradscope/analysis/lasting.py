"""What has lasted up to the end of the records."""

import numpy as np

from gradscope.analysis.robust import F64, Bools, measured, since


def lasting(values: F64, holds: Bools, *, least: int, share: float) -> int | None:
    """The row since which it holds, up to the last that was measured; None if not for long.

    Long is at least `least` measured rows in a row, and this share of all that were measured.
    """
    known = np.flatnonzero(measured(values))
    begin = since(holds[known])
    if known.size == 0 or known.size - begin < max(least, share * known.size):
        return None
    return int(known[begin])
