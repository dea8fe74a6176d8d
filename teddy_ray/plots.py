"""The report's plots as geometry, in per cent of their boxes: templates/plots.html draws them at any width, and their
text stays text of the page's own size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teddy_ray.records import Row
from teddy_ray.tables import title

LOG_FROM = 30
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""

NUM_STYLES = 9
"""Colours that templates/report.css has for curves; the first is that of the distilled set."""

ByStudent = Mapping[str, Mapping[str, Mapping[str, Row]]]
"""Student -> budget of student steps, as the names of the rows say it -> what was trained on -> accuracy."""


@dataclass(frozen=True)
class Axis:
    """From low to high, with so many ticks or fewer."""

    low: float
    high: float
    num_ticks: int = 5
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, in per cent of the axis; outside of it, at its end."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(max(value, self.low)) - low) / (high - low)
        return round(100 * min(share, 1.0), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values on the axis: (per cent, label)."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if self.high < 50 * self.low else (1, 3) if self.high < 1000 * self.low else (1,)
            values = [factor * 10.0**power for power in powers for factor in factors]
        else:
            rough = (self.high - self.low) / self.num_ticks
            unit = 10.0 ** math.floor(math.log10(rough))
            step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
            values = [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        kept = [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
        return [(self.at(value), f"{value:,.6g}") for value in kept]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True)
class Dot:
    """An accuracy with its standard deviation to both sides."""

    title: str
    row: Row
    x: float
    low: float
    high: float
    leads: bool


@dataclass(frozen=True)
class Group:
    """What is comparable: one student, one budget of steps. guide: where the accuracy of the distilled set stands."""

    title: str
    dots: Sequence[Dot]
    guide: float | None


@dataclass(frozen=True)
class Dots:
    """Accuracies of all rows on one axis."""

    axis: Axis
    groups: Sequence[Group]


@dataclass(frozen=True)
class Point:
    """A point of a curve, with the ends of its error bar."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """style: the CSS class that it is drawn in."""

    title: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Curves on common axes."""

    title: str
    x_title: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]


def by_student(accuracy: Mapping[str, Row]) -> ByStudent:
    """The rows of the table, whose names are `row`, `row@budget`, `row/student` or `row@budget/student`."""
    students: dict[str, dict[str, dict[str, Row]]] = {}
    for name, row in accuracy.items():
        base, _, budget = name.partition("/")[0].partition("@")
        students.setdefault(row.student, {}).setdefault(budget, {})[base] = row
    return students


def dots(students: ByStudent) -> Dots:
    """Every row with its error bar, grouped by student and budget."""
    axis = _accuracy_axis(_every_row(students))
    groups = []
    for student, budgets in students.items():
        for rows in budgets.values():
            drawn = [
                Dot(
                    title(base),
                    row,
                    axis.at(row.mean),
                    axis.at(row.mean - (row.std or 0)),
                    axis.at(row.mean + (row.std or 0)),
                    base == "distilled",
                )
                for base, row in rows.items()
            ]
            distilled = rows.get("distilled")
            named = [f"Student {student}"] if len(students) > 1 else []
            if len(budgets) > 1 and distilled:
                named.append(f"{distilled.student_steps:,} steps")
            groups.append(Group(", ".join(named), drawn, axis.at(distilled.mean) if distilled else None))
    return Dots(axis, groups)


def over_steps(students: ByStudent) -> list[Chart]:
    """Accuracy over student steps, one chart per student, of what was trained on for several budgets."""
    several = {student: _several(budgets) for student, budgets in students.items()}
    rows = [row for bases in several.values() for budgets in bases.values() for row in budgets]
    if not rows:
        return []
    steps = [row.student_steps for row in rows]
    log = max(steps) > 10 * min(steps)  # the whole training set takes many more
    x = Axis(0.8 * min(steps) if log else 0, (1.25 if log else 1.05) * max(steps), num_ticks=4, log=log)
    y = _accuracy_axis(rows)
    order = list(dict.fromkeys(base for bases in several.values() for base in bases))
    charts = []
    for student, bases in several.items():
        curves = [
            Curve(title(base), f"s{order.index(base) % NUM_STYLES}", [_point(row, x, y) for row in budgets])
            for base, budgets in bases.items()
        ]
        charts.append(Chart(student, "student steps" + (", logarithmic" if log else ""), x, y, curves))
    return charts


def _several(budgets: Mapping[str, Mapping[str, Row]]) -> dict[str, list[Row]]:
    """What was trained on -> its rows by student steps, where there is more than one."""
    bases: dict[str, list[Row]] = {}
    for rows in budgets.values():
        for base, row in rows.items():
            bases.setdefault(base, []).append(row)
    return {base: sorted(rows, key=lambda row: row.student_steps) for base, rows in bases.items() if len(rows) > 1}


def _point(row: Row, x: Axis, y: Axis) -> Point:
    spread = row.std or 0
    return Point(x.at(row.student_steps), y.at(row.mean), y.at(row.mean - spread), y.at(row.mean + spread))


def losses(names: Sequence[str], curves: Sequence[npt.NDArray[np.float64]]) -> list[Chart]:
    """A chart per term of Eq. 7, of each unit and of their mean. curves: (points, step and three terms) per unit."""
    titles = ("distance to the statistics of the real data", "u · cross-entropy", "priors")
    last, style = max(curve[-1, 0] for curve in curves), "unit" if len(curves) > 1 else "mean"
    charts = []
    for term, name in enumerate(titles, start=1):
        values = [curve[:, term] for curve in curves]
        highest, lowest = max(y.max() for y in values), min(y.min() for y in values)
        if highest <= 0:
            continue  # this term is not in the loss
        log = bool(lowest > 0 and highest > LOG_FROM * lowest)
        axes = Axis(0, last, num_ticks=4), Axis(lowest * 0.8 if log else 0, highest * 1.05, log=log)
        drawn = [
            _curve(unit, style, curve[:, 0], y, axes) for unit, curve, y in zip(names, curves, values, strict=True)
        ]
        if len(curves) > 1 and len({len(y) for y in values}) == 1:
            drawn.append(_curve("mean of the units", "mean", curves[0][:, 0], np.mean(values, axis=0), axes))
        charts.append(Chart(name + (", logarithmic" if log else ""), "step", *axes, drawn))
    return charts


def _curve(
    name: str, style: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], axes: tuple[Axis, Axis]
) -> Curve:
    at = [(axes[0].at(float(step)), axes[1].at(float(loss))) for step, loss in zip(x, y, strict=True)]
    return Curve(name, style, [Point(left, height, height, height) for left, height in at])


def _every_row(students: ByStudent) -> Iterable[Row]:
    return (row for budgets in students.values() for rows in budgets.values() for row in rows.values())


def _accuracy_axis(rows: Iterable[Row]) -> Axis:
    """As close around the error bars as a margin allows, within [0, 1]."""
    ends = [row.mean + sign * (row.std or 0) for row in rows for sign in (-1, 1)]
    low, high = max(0.0, min(ends)), min(1.0, max(ends))
    margin = max(0.06 * (high - low), 0.005)
    return Axis(max(0.0, low - margin), min(1.0, high + margin), num_ticks=6)
