"""The step that is open."""

from dataclasses import dataclass, field

from gradscope.capture.parameters import ParameterReader
from gradscope.capture.recorder import Rows


@dataclass(slots=True)
class Step:
    """A step from when it opens; `rows` are None where it is not recorded."""

    number: int
    rows: Rows | None
    reader: ParameterReader | None = None
    # Whether the model's own forward, or that of a part, was seen to begin.
    entered: bool = False
    # Identities of the optimizers that have stepped; 0 for a hand-written update.
    stepped: set[int] = field(default_factory=set)
