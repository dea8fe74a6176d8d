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

Comparison = Mapping[str, Mapping[str, Sequence[Row]]]
"""Student -> row of the table -> its accuracies, one per budget of student steps, the shortest first."""


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
            values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
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
    """An accuracy with its standard deviation to both sides. title: empty where it continues the row above."""

    title: str
    row: Row
    x: float
    low: float
    high: float
    leads: bool


@dataclass(frozen=True)
class Group:
    """The dots of one student; guide: where its accuracy on the distilled set stands."""

    student: str
    dots: Sequence[Dot]
    guide: float


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


def compare(accuracy: Mapping[str, Row]) -> Comparison:
    """The table's rows by student, then by what was trained on, then by student steps."""
    students: dict[str, dict[str, list[Row]]] = {}
    for name, row in accuracy.items():
        base = name.partition("/")[0].partition("@")[0]
        students.setdefault(row.student, {}).setdefault(base, []).append(row)
    return {
        student: {base: sorted(rows, key=lambda row: row.student_steps) for base, rows in bases.items()}
        for student, bases in students.items()
    }


def dots(comparison: Comparison) -> Dots:
    """Every row of every student with its error bar."""
    axis = _accuracy_axis(_every_row(comparison))
    groups = []
    for student, bases in comparison.items():
        drawn = [
            Dot(
                title(base) if first else "",
                row,
                axis.at(row.mean),
                axis.at(row.mean - (row.std or 0)),
                axis.at(row.mean + (row.std or 0)),
                base == "distilled",
            )
            for base, rows in bases.items()
            for first, row in zip((True, *[False] * len(rows)), rows, strict=False)
        ]
        groups.append(Group(student, drawn, axis.at(bases["distilled"][0].mean)))
    return Dots(axis, groups)


def over_steps(comparison: Comparison) -> list[Chart]:
    """Accuracy over student steps, one chart per student, of the rows that were trained for several budgets."""
    several = {
        student: {base: rows for base, rows in bases.items() if len(rows) > 1} for student, bases in comparison.items()
    }
    rows = list(_every_row(several))
    if not rows:
        return []
    order = list(dict.fromkeys(base for bases in comparison.values() for base in bases))
    x, y = Axis(0, 1.05 * max(row.student_steps for row in rows), num_ticks=4), _accuracy_axis(rows)
    charts = []
    for student, bases in several.items():
        curves = [
            Curve(title(base), f"s{order.index(base) % 9}", [_point(row, x, y) for row in rows])
            for base, rows in bases.items()
        ]
        charts.append(Chart(student, "student steps", x, y, curves))
    return charts


def _point(row: Row, x: Axis, y: Axis) -> Point:
    spread = row.std or 0
    return Point(x.at(row.student_steps), y.at(row.mean), y.at(row.mean - spread), y.at(row.mean + spread))


def losses(names: Sequence[str], curves: Sequence[npt.NDArray[np.float64]]) -> list[Chart]:
    """A chart per term of Eq. 7, of each unit and of their mean. curves: (points, step and three terms) per unit."""
    titles = ("distance to the statistics of the real data", "u · cross-entropy", "priors")
    last = max(curve[-1, 0] for curve in curves)
    charts = []
    for term, name in enumerate(titles, start=1):
        values = [curve[:, term] for curve in curves]
        highest, lowest = max(y.max() for y in values), min(y.min() for y in values)
        if highest <= 0:
            continue  # this term is not in the loss
        log = bool(lowest > 0 and highest > LOG_FROM * lowest)
        axes = Axis(0, last, num_ticks=4), Axis(lowest * 0.8 if log else 0, highest * 1.05, log=log)
        drawn = [_curve(unit, "unit", curve[:, 0], y, axes) for unit, curve, y in zip(names, curves, values, strict=True)]
        if len(curves) > 1 and len({len(y) for y in values}) == 1:
            drawn.append(_curve("mean of the units", "mean", curves[0][:, 0], np.mean(values, axis=0), axes))
        charts.append(Chart(name + (", logarithmic" if log else ""), "step", *axes, drawn))
    return charts


def _curve(
    name: str, style: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], axes: tuple[Axis, Axis]
) -> Curve:
    at = [(axes[0].at(float(step)), axes[1].at(float(loss))) for step, loss in zip(x, y, strict=True)]
    return Curve(name, style, [Point(left, height, height, height) for left, height in at])


def _every_row(comparison: Comparison) -> Iterable[Row]:
    return (row for bases in comparison.values() for rows in bases.values() for row in rows)


def _accuracy_axis(rows: Iterable[Row]) -> Axis:
    """As close around the error bars as a margin allows, within [0, 1]."""
    ends = [row.mean + sign * (row.std or 0) for row in rows for sign in (-1, 1)]
    low, high = max(0.0, min(ends)), min(1.0, max(ends))
    margin = max(0.06 * (high - low), 0.005)
    return Axis(max(0.0, low - margin), min(1.0, high + margin), num_ticks=6)
