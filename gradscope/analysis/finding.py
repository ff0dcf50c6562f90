"""What a rule says: Severity, Evidence, Finding."""

from dataclasses import dataclass
from enum import Enum
from functools import total_ordering


@total_ordering
class Severity(Enum):
    """Harm done: info (none shown), warning (training is worse for it), error (can't work)."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Severity):
            return NotImplemented
        order = list(Severity)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A number that a reader can check: which quantity, of what, when, against which limit.

    `quantity` names a quantity of the tables, a scalar of the run, or a number derived from
    them (then `entity` says between what). `limit` is None where no limit applies.
    """

    quantity: str
    entity: str | None
    first_step: int
    last_step: int
    observed: float
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    `layer` is where it shows first (None: everywhere). `message` is one sentence with the
    numbers; why it matters stands on the rule's page. `remedies` come most likely first.
    `explained_by` holds the codes of the findings that cause this one.
    """

    code: str
    name: str
    severity: Severity
    layer: str | None
    message: str
    evidence: tuple[Evidence, ...] = ()
    remedies: tuple[str, ...] = ()
    explained_by: tuple[str, ...] = ()

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last step of the evidence; None without evidence."""
        if not self.evidence:
            return None
        first = min(evidence.first_step for evidence in self.evidence)
        return first, max(evidence.last_step for evidence in self.evidence)
