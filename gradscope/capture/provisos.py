"""What limits a watch from its beginning, for the report."""

from collections.abc import Mapping
from typing import Any

from gradscope.capture.distributed import Processes, limits
from gradscope.capture.folders import changed_settings
from gradscope.capture.guard import OUTPUTS, Guard
from gradscope.log.writer import Continuation


def say_provisos(
    guard: Guard,
    meta: Mapping[str, Any],
    *,
    scripted: bool,
    earlier: Continuation | None,
    known: Processes | None,
) -> None:
    """Note them; aloud what the user should know at once."""
    if scripted:
        message = "the model is compiled: its parameters are recorded, its outputs are not"
        guard.say(OUTPUTS, message)
    if earlier is not None:
        for message in changed_settings(earlier, meta):
            guard.say("resume", message, aloud=False)
    if known is not None:
        guard.say("processes", limits(known), aloud=False)
