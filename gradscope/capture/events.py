"""What in the pulse is worth a closer look: a loss that leaps up, or is not finite."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from gradscope.capture.pulse import Pulse

# The losses that a new one is compared with; of fewer nothing can be said.
_LATEST, _FEWEST = 50, 20
# So many robust standard deviations (1.4826 times the median deviation, of normal noise) above the
# median, and so large a part of it: a loss that has come to rest has none.
_DEVIATIONS, _SCALE, _LEAST_RISE = 8.0, 1.4826, 0.2


class Events:
    """Compares each step's loss with those before it, and calls back at an event."""

    def __init__(self, on_event: Callable[[], None]) -> None:
        self._on_event = on_event
        self._losses: deque[float] = deque(maxlen=_LATEST)
        # Whether losses are known late: they are on a device.
        self._is_late = False

    def closed(self, pulse: Pulse) -> None:
        """A step has closed: what is known of it in host memory."""
        loss, flag = pulse.at_hand("loss"), pulse.at_hand("loss_nonfinite")
        if loss is None or flag is None:
            self._is_late = True
        else:
            self._see(loss, flag)

    def arrived(self, pulses: Iterable[Mapping[str, float]]) -> None:
        """The pulses of some steps have arrived in host memory, on the recorder's thread."""
        if self._is_late:
            for known in pulses:
                self._see(known.get("loss", math.nan), known.get("loss_nonfinite", math.nan))

    def _see(self, loss: float, flag: float) -> None:
        if flag > 0:
            self._on_event()
        elif math.isfinite(loss):
            if self._is_spike(loss):
                self._on_event()
            self._losses.append(loss)

    def _is_spike(self, loss: float) -> bool:
        known = self._losses
        if len(known) < _FEWEST or loss <= max(known):
            return False
        middle = statistics.median(known)
        spread = _SCALE * statistics.median(abs(other - middle) for other in known)
        return loss - middle > max(_DEVIATIONS * spread, _LEAST_RISE * abs(middle))
