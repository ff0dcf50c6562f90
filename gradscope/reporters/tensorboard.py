"""What TensorBoard's text and images tabs show of a report: Markdown and PNG."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from gradscope.analysis.report import Report
from gradscope.analysis.robust import F64, Bools, median
from gradscope.analysis.words import count, number, share
from gradscope.record import Run, Table
from gradscope.reporters.markdown import MarkdownReporter, escaped, grid

_MAX_ROWS = 10
# The layers are judged by their latest steps: few enough to be of now, enough for a median.
_LATEST = 10

# TensorBoard loads ten of each picture: each is to stay below some 150 kB.
_PIXELS_PER_INCH = 90
_COLORS = 256


def findings_markdown(report: Report) -> str:
    """The findings for TensorBoard's text tab, root causes first."""
    return MarkdownReporter(folded=False).render(report)


def worst_layers_markdown(run: Run) -> str:
    """The layers that stand out, of whatever model: their names make no tags.

    The parameters whose gradient is farthest from the median of their kind, and the modules with
    most dead or saturated units; both by their medians over the latest ten recorded steps.
    """
    steps = run.recorded_steps[-_LATEST:]
    if not len(steps):
        return "Nothing was recorded.\n"
    window = f"{count(len(steps), 'recorded step')}, {steps[0]} to {steps[-1]}"
    return "\n\n".join(
        [
            "## Gradients farthest from the median of their kind",
            _farthest(run.parameters),
            "## Layers with most dead or saturated units",
            _least_alive(run.modules),
            f"Medians over the latest {window}.",
        ]
    )


def _farthest(table: Table) -> str:
    norms, ratios = _latest(table, "grad_norm"), _latest(table, "update_ratio")
    broken: Bools = np.any(table["grad_nonfinite"][-_LATEST:] > 0, axis=0)
    kinds = np.array([entity.group for entity in table.entities])
    usual = np.full(len(kinds), np.nan)
    for kind in np.unique(kinds):
        usual[kinds == kind] = median(norms[kinds == kind], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = norms / usual
        distance = np.where(broken | (norms == 0), np.inf, np.abs(np.log10(relative)))
    rows = [
        [
            table.names[row],
            kinds[row],
            "NaN or infinite" if broken[row] else number(norms[row]),
            "" if np.isnan(relative[row]) or broken[row] else f"{number(relative[row])} ×",
            "not measured" if np.isnan(ratios[row]) else number(ratios[row]),
        ]
        for row in _largest(distance)
    ]
    heads = ["parameter", "kind", "gradient norm", "relative to the median", "update ratio"]
    return _grid(heads, rows) if rows else "No gradient was measured."


def _least_alive(table: Table) -> str:
    dead, saturated = (
        _latest(table, quantity) for quantity in ("dead_unit_fraction", "output_saturated_fraction")
    )
    if np.isnan(dead).all() and np.isnan(saturated).all():
        return "Neither was measured."
    worse = np.fmax(dead, saturated)
    rows = [
        [
            table.names[row],
            table.entities[row].type,
            *("" if np.isnan(found[row]) else share(found[row]) for found in (dead, saturated)),
        ]
        for row in _largest(np.where(worse > 0, worse, np.nan))
    ]
    heads = ["layer", "type", "dead units", "saturated outputs"]
    return _grid(heads, rows) if rows else "None has any."


def _latest(table: Table, quantity: str) -> F64:
    """Of each entity, the median over the latest recorded steps."""
    return median(table[quantity][-_LATEST:], axis=0)


def _largest(values: F64) -> list[int]:
    """Where the largest few are, the first of equals first."""
    order = np.argsort(-values, kind="stable")
    return [row for row in order.tolist() if not np.isnan(values[row])][:_MAX_ROWS]


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return grid(heads, [list(map(escaped, row)) for row in rows])


def pictures(report: Report) -> dict[str, bytes]:
    """The pictures of a run, as PNG, by name; none where nothing was recorded."""
    # matplotlib takes a second to import.
    from gradscope.reporters.figures import gradient_by_depth, gradient_heatmap  # noqa: PLC0415
    from gradscope.reporters.figures.canvas import rendered  # noqa: PLC0415

    if not len(report.run.recorded_steps):
        return {}
    draw = {"heatmap": gradient_heatmap, "gradient_by_depth": gradient_by_depth}
    with warnings.catch_warnings():
        # Nothing that who trains could mend.
        warnings.simplefilter("ignore")
        figures = {name: make(report.run, findings=report.findings) for name, make in draw.items()}
        return {
            name: rendered(figure, dpi=_PIXELS_PER_INCH, colors=_COLORS)
            for name, figure in figures.items()
        }
