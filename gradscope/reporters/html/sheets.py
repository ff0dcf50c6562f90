"""The tables of the page: each parameter and each module in one row of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.report import Report
from gradscope.analysis.words import number
from gradscope.quantities import CATALOGUE
from gradscope.record import Entity, FloatArray, Table
from gradscope.reporters.figures.labels import marked_rows

MAX_ROWS = 300
_LONG_NAME = 20
_NOT_MEASURED = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A quantity, and one number per entity made of it."""

    heading: str
    quantity: str
    reduce: Callable[[FloatArray], float]
    share: bool = False

    @property
    def meaning(self) -> str:
        """What the quantity is."""
        listed = (quantity for table in CATALOGUE.values() for quantity in table)
        return next(quantity.meaning for quantity in listed if quantity.name == self.quantity)

    def cell(self, measured: FloatArray) -> "Cell":
        """The number of one entity, from what was measured of it."""
        if not measured.size:
            return Cell(_NOT_MEASURED, "")
        value = float(self.reduce(measured))
        text = f"{number(100 * value)}%" if self.share else number(value)
        return Cell(text, repr(value).replace("inf", "Infinity"))


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as it is shown, and as rows are sorted by it; "": there is none."""

    text: str
    value: str


@dataclass(frozen=True, slots=True)
class Row:
    """One entity and its cells; `marked` where it has a warning or an error."""

    entity: Entity
    marked: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table; `total` counts the rows that are not shown too."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    total: int

    @property
    def has_long_names(self) -> bool:
        """Whether the names need room of their own."""
        return any(len(row.entity.name) > _LONG_NAME for row in self.rows)


def _last(measured: FloatArray) -> float:
    return float(measured[-1])


_PARAMETER_COLUMNS = (
    Column("gradient norm, median", "grad_norm", np.median),
    Column("gradient norm, last", "grad_norm", _last),
    Column("zeros, median", "grad_zero_fraction", np.median, share=True),
    Column("steps with NaN or infinite", "grad_nonfinite", np.count_nonzero),
    Column("weight norm, last", "weight_norm", _last),
    Column("update ratio, median", "update_ratio", np.median),
    Column("update ratio, last", "update_ratio", _last),
)
_MODULE_COLUMNS = (
    Column("output rms, median", "output_rms", np.median),
    Column("output rms, last", "output_rms", _last),
    Column("zeros, median", "output_zero_fraction", np.median, share=True),
    Column("dead units, last", "dead_unit_fraction", _last, share=True),
    Column("saturated, last", "output_saturated_fraction", _last, share=True),
    Column("steps with NaN or infinite", "output_nonfinite", np.count_nonzero),
    Column("output gradient norm, median", "output_grad_norm", np.median),
    Column("output gradient norm, last", "output_grad_norm", _last),
)


def sheets(report: Report) -> list[Sheet]:
    """The tables that have rows."""
    made = (
        _sheet("Parameters", report.run.parameters, _PARAMETER_COLUMNS, report),
        _sheet("Module outputs", report.run.modules, _MODULE_COLUMNS, report),
    )
    return [sheet for sheet in made if sheet.rows and len(report.run.recorded_steps)]


def _sheet(title: str, table: Table, columns: tuple[Column, ...], report: Report) -> Sheet:
    marked = marked_rows(table.entities, report.findings)
    shown = _shown(table.entities, marked)
    rows = tuple(
        Row(table.entities[row], row in marked, _cells(table, columns, row)) for row in shown
    )
    return Sheet(title, columns, rows, len(table.entities))


def _shown(entities: Sequence[Entity], marked: Sequence[int]) -> list[int]:
    """The marked rows and then the first, as many as are shown, in the order of depth."""
    ordered = sorted(range(len(entities)), key=lambda row: entities[row].depth)
    wanted = dict.fromkeys([*marked, *ordered])
    return sorted(list(wanted)[:MAX_ROWS], key=lambda row: entities[row].depth)


def _cells(table: Table, columns: tuple[Column, ...], row: int) -> tuple[Cell, ...]:
    series = (table[column.quantity][:, row] for column in columns)
    return tuple(
        column.cell(values[~np.isnan(values)])
        for column, values in zip(columns, series, strict=True)
    )
