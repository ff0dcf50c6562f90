"""What TensorBoard's own tabs show: a dozen scalars, and the findings as text.

The number of tags does not depend on the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.finding import Finding
from gradscope.analysis.report import Report
from gradscope.quantities import CATALOGUE, TableName
from gradscope.reporters.outline import Branch, outline
from gradscope.reporters.provenance import particulars, unseen
from gradscope.reporters.wording import (
    checked,
    count,
    inert,
    since,
    skipped_by_reason,
    title,
    verdict,
    why,
)

# The user's own scalars beyond this many are kept in the run, but get no tag of their own.
_MAX_USER_TAGS = 40

_PULSE_TAGS = {
    "loss": "training/loss",
    "learning_rate": "training/learning_rate",
    "grad_norm_before_clip": "gradient/norm_before_clip",
}
# The text tab shows one run after the other; a long text hides the next.
_MAX_CAUSES = 10
_MAX_CONSEQUENCES = 10

# Not a curve.
_HIDDEN = {"loss_nonfinite"}

Row = NDArray[np.float32]


def pulse_scalars(pulses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Tag → the latest value among some pulses, also of what is not logged at every step."""
    latest: dict[str, float] = {}
    for known in pulses:
        latest.update(known)
    own = {tag: latest[name] for name, tag in _PULSE_TAGS.items() if name in latest}
    users = [name for name in latest if name not in _PULSE_TAGS and name not in _HIDDEN]
    return own | {f"user/{name}": latest[name] for name in users[:_MAX_USER_TAGS]}


def _norm(row: Row) -> float:
    return float(np.sqrt(np.sum(row.astype(np.float64) ** 2)))


def _median(row: Row) -> float:
    return float(np.median(row))


def _largest(row: Row) -> float:
    return float(row.max())


def _smallest(row: Row) -> float:
    return float(row.min())


def _total(row: Row) -> float:
    return float(row.sum())


_TABLE_TAGS: tuple[tuple[str, TableName, str, Callable[[Row], float]], ...] = (
    ("gradient/global_norm", "parameters", "grad_norm", _norm),
    ("gradient/largest_layer_norm", "parameters", "grad_norm", _largest),
    ("gradient/median_layer_norm", "parameters", "grad_norm", _median),
    ("gradient/smallest_layer_norm", "parameters", "grad_norm", _smallest),
    ("gradient/nonfinite_entries", "parameters", "grad_nonfinite", _total),
    ("update/median_ratio", "parameters", "update_ratio", _median),
    ("update/largest_ratio", "parameters", "update_ratio", _largest),
    ("weight/global_norm", "parameters", "weight_norm", _norm),
    ("output/largest_rms", "modules", "output_rms", _largest),
    ("output/largest_dead_unit_fraction", "modules", "dead_unit_fraction", _largest),
    ("output/largest_saturated_fraction", "modules", "output_saturated_fraction", _largest),
)


def table_scalars(tables: Mapping[TableName, Row]) -> dict[str, float]:
    """Tag → number, of one recorded step; what was not measured has no point."""
    scalars: dict[str, float] = {}
    for tag, table, quantity, reduce in _TABLE_TAGS:
        index = [q.name for q in CATALOGUE[table]].index(quantity)
        row = tables[table][index]
        measured = row[~np.isnan(row)]
        if measured.size:
            scalars[tag] = reduce(measured)
    if scalars.get("gradient/nonfinite_entries", 0) > 0:
        # The norm of what is left beside NaN is not the gradient's; TensorBoard marks NaN.
        scalars["gradient/global_norm"] = math.nan
    return scalars


def findings_markdown(report: Report) -> str:
    """The findings for TensorBoard's text tab, root causes first."""
    branches = outline(report)
    harmful = [branch for branch in branches if branch.harmful]
    notes = [finding for branch in branches if not branch.harmful for finding in branch]
    blocks = [f"## {_escaped(verdict(report))}"]
    for branch in harmful[:_MAX_CAUSES]:
        blocks += _cause(report, branch)
    if len(harmful) > _MAX_CAUSES:
        blocks.append(f"And {count(len(harmful) - _MAX_CAUSES, 'more root cause')}.")
    if notes:
        blocks += ["### Also seen, without harm", _points(_cut(notes))]
    facts = [f"Checked: {checked(report)}"]
    facts += [
        f"Skipped: {', '.join(rules)} ({reason})"
        for reason, rules in skipped_by_reason(report).items()
    ]
    facts += [f"Not seen: {gap}" for gap in unseen(report.run)]
    facts += [f"{label}: {fact}" for label, fact in particulars(report.run).items()]
    blocks += ["### How it was measured", _points(map(_escaped, facts))]
    return "\n\n".join(blocks) + "\n"


def _cause(report: Report, branch: Branch) -> list[str]:
    finding = branch.finding
    heading = f"{finding.severity.value.upper()}: {title(finding)}"
    blocks = [f"### {_escaped(heading)}", _escaped(finding.message)]
    when, reason = since(finding, report.run), why(report, finding)
    if when:
        blocks.append(f"**Seen** {_escaped(when)}.")
    if reason:
        blocks.append(f"**Why it matters:** {_escaped(reason)}")
    if finding.remedies:
        numbered = enumerate(map(_escaped, finding.remedies), start=1)
        blocks += ["**What to do**", "\n".join(f"{place}. {text}" for place, text in numbered)]
    explained = [other for other in branch if other is not finding]
    if explained:
        blocks += ["**This explains**", _points(_cut(explained))]
    return blocks


def _point(finding: Finding) -> str:
    heading = f"{finding.severity.value}: {title(finding)}"
    return f"**{_escaped(heading)}** {_escaped(finding.message)}"


def _cut(findings: Sequence[Finding]) -> list[str]:
    """A line for each of the first, and how many more there are."""
    shown = [_point(finding) for finding in findings[:_MAX_CONSEQUENCES]]
    more = len(findings) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def _points(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MARKUP = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]#!|"} | _HTML)


def _escaped(text: str) -> str:
    """The text without meaning to Markdown and HTML: names can hold anything."""
    return inert(text).translate(_MARKUP)
