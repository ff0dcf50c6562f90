"""Which families of faults rules may be tuned on, and on which they are only judged.

By a hash of the family's name, fixed before the first limit was set; nobody chooses.
"""

import hashlib
from typing import Literal

Half = Literal["tuning", "test"]


def half(family: str) -> Half:
    """The half that the family is in."""
    return "test" if hashlib.sha256(family.encode()).digest()[0] % 2 else "tuning"
