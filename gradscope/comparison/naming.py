"""What stands under a name in a catalogue, and the nearest name where nothing does."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from gradscope.errors import ConfigError

Entry = TypeVar("Entry")


def known(
    argument: str, wanted: str, entries: Mapping[str, Entry], also: Mapping[str, str], function: str
) -> Entry:
    """The entry of that name, upper case or lower, or of another name for it.

    also: other names, each with that of the entry. function: what may be given in place of a name.
    Raises ConfigError for an unknown name, naming the nearest.
    """
    name = also.get(wanted.lower(), wanted.lower())
    if name not in entries:
        nearest = difflib.get_close_matches(name, [*entries, *also], 1, 0.0)
        message = (
            f"{argument}: {wanted!r} is unknown; the nearest name is {nearest[0]!r}. "
            f"Known are {', '.join(entries)}, or give {function}"
        )
        raise ConfigError(message)
    return entries[name]
