"""What the cells of a comparison hold: our accuracies over seeds, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from teddy_ray.comparison.beside import Beside, DataShape, PaperRow
from teddy_ray.comparison.file import Method, Table
from teddy_ray.comparison.paper import Figure
from teddy_ray.comparison.runs import Cell, Layout, columns_of
from teddy_ray.judgement import controls_of, judge
from teddy_ray.records import Row
from teddy_ray.rows import ROWS

NONE: Mapping[str, str] = MappingProxyType({})
UNFINISHED = "not finished"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell. Accuracies are fractions, one per finished seed; steps, labels and split are None until one is."""

    accuracies: tuple[float, ...]
    num_seeds: int
    images_per_class: int
    student: str
    labels: str | None
    split: str | None
    student_steps: int | None
    runs: Mapping[int, str]
    """Names of the finished runs, by seed."""
    failed: tuple[str, ...]
    """Names of the runs that failed."""
    paper: Figure | None
    leads: bool = False
    """Whether it is shown to be better than every other of its column with as many student steps."""

    @property
    def finished(self) -> bool:
        return len(self.accuracies) == self.num_seeds

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.finished else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.accuracies) if self.finished and self.num_seeds > 1 else None

    def as_row(self) -> Row | None:
        """The accuracies of all seeds, once they are there."""
        if self.mean is None:
            return None
        return Row(
            mean=self.mean,
            std=self.std,
            n=self.num_seeds,
            n_counts="seeds of the whole recipe",
            labels=self.labels or "",
            split=self.split or "",
            student=self.student,
            student_steps=self.student_steps or 0,
            validation=None,
        )

    def __str__(self) -> str:
        if (row := self.as_row()) is not None:
            return str(row)
        state = "failed" if self.failed else "…"
        return f"{state} ({len(self.accuracies)} of {self.num_seeds})" if self.accuracies else state


@dataclass(frozen=True)
class ResultRow:
    """A row of ours."""

    method: Method
    cells: tuple[Result, ...]

    @property
    def labels(self) -> str:
        """What its students learn from, as soon as one is finished."""
        return next((cell.labels for cell in self.cells if cell.labels), "")

    @property
    def competes(self) -> bool:
        """Students of the whole training set learn from more images than the others."""
        return ROWS[self.method.row.partition("@")[0]].images is not None


@dataclass(frozen=True)
class ResultTable:
    """A table with what it says."""

    table: Table
    setting: str
    """What is the same in all cells, and the student steps."""
    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    paper_rows: tuple[PaperRow, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]


def result_tables(
    layout: Layout,
    summaries: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, DataShape],
    failures: Mapping[str, str] = NONE,
) -> tuple[ResultTable, ...]:
    """The tables as far as runs are finished. All by name of the run; shapes of all runs, failures with reasons."""
    tables = []
    for t, table in enumerate(layout.comparison.tables):
        shape = shapes[layout.of(t, 0)[0].runs[0].name]
        beside = Beside(layout, t, shape)
        rows = [
            ResultRow(
                method,
                tuple(_result(cell, summaries, failures, beside.figure(method, cell)) for cell in layout.of(t, r)),
            )
            for r, method in enumerate(layout.comparison.rows)
        ]
        failed = dict.fromkeys(name for row in rows for cell in row.cells for name in cell.failed)
        tables.append(
            ResultTable(
                table,
                _setting(table, rows),
                tuple(_heading(column) for column in columns_of(table)),
                tuple(_mark_leaders(rows, shape.num_test)),
                beside.rows(),
                tuple(_verdicts(layout, t, rows, shape.num_test)),
                (*(f"failed: run {name}: {failures[name]}" for name in failed), *beside.notes()),
            )
        )
    return tuple(tables)


def _result(
    cell: Cell, summaries: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], figure: Figure | None
) -> Result:
    finished = [(run, key) for run, key in cell.sources() if run.name in summaries]
    rows = [summaries[run.name]["accuracy"][key] for run, key in finished]
    one = rows[0] if rows else {"labels": None, "split": None, "student_steps": None}
    return Result(
        accuracies=tuple(row["mean"] for row in rows),
        num_seeds=len(cell.runs),
        images_per_class=cell.images_per_class,
        student=cell.student,
        labels=one["labels"],
        split=one["split"],
        student_steps=one["student_steps"],
        runs={run.seed: run.name for run, _ in finished},
        failed=tuple(run.name for run in cell.runs if run.name in failures),
        paper=figure,
    )


def _heading(column: int | str) -> str:
    if isinstance(column, str):
        return column
    return f"{column} image{'s' if column != 1 else ''} per class"


def _setting(table: Table, rows: Sequence[ResultRow]) -> str:
    """What the columns do not vary, and how many steps students take, as far as it is known."""
    cell = rows[0].cells[0]
    same = f"Student {cell.student}" if table.columns.students is None else _heading(cell.images_per_class)
    columns: dict[str, list[str]] = {}
    for index, column in enumerate(columns_of(table)):
        found = {row.cells[index].student_steps for row in rows if row.competes} - {None}
        if found:
            columns.setdefault(" or ".join(f"{steps:,}" for steps in sorted(filter(None, found))), []).append(
                _heading(column)
            )
    if not columns:
        return f"{same}."
    steps = "; ".join(f"{steps} with {', '.join(named)}" for steps, named in columns.items())
    return f"{same}. Student steps: {steps if len(columns) > 1 else next(iter(columns))}."


# -- what follows ----------------------------------------------------------------------------------------------------


def _mark_leaders(rows: Sequence[ResultRow], num_test: int) -> list[ResultRow]:
    """Mark the best of each column and number of student steps, where all are finished and it is shown to be."""
    columns = list(zip(*(row.cells for row in rows), strict=True))
    competing = [r for r, row in enumerate(rows) if row.competes]
    leaders = [_leaders({r: column[r] for r in competing}, num_test) for column in columns]
    return [
        replace(row, cells=tuple(replace(cell, leads=r in led) for cell, led in zip(row.cells, leaders, strict=True)))
        for r, row in enumerate(rows)
    ]


def _leaders(contestants: Mapping[int, Result], num_test: int) -> set[int]:
    """Of the contestants of a column, by row."""
    budgets: dict[int, dict[int, Row]] = {}
    for r, cell in contestants.items():
        row = cell.as_row()
        if row is None:
            return set()
        budgets.setdefault(row.student_steps, {})[r] = row
    leaders = set()
    for equal in budgets.values():
        best = max(equal, key=lambda r: equal[r].mean)
        judgements = [judge(equal[best], row, num_test=num_test) for r, row in equal.items() if r != best]
        if judgements and all(judgement and judgement.word == "better" for judgement in judgements):
            leaders.add(best)
    return leaders


def _verdicts(layout: Layout, t: int, rows: Sequence[ResultRow], num_test: int) -> Iterator[str]:
    """Sentences for each distilled row, against its controls in the same runs, column by column."""
    runs = [[[run.name for run in cell.runs] for cell in layout.of(t, r)] for r in range(len(rows))]
    for row, of_row in zip(rows, runs, strict=True):
        for control, opponent in controls_of(row.method.row):
            found = (
                other
                for other, theirs in zip(rows, runs, strict=True)
                if (other.method.row, theirs) == (control, of_row)
            )
            other = next(found, None)
            if other is not None:
                words = _by_word(layout.comparison.tables[t], row, other, num_test)
                yield f"{row.method.title} against {opponent}: {words}."
            elif control.startswith("random"):
                yield (
                    f"{row.method.title}: no row shows random real images under its labels "
                    f"(row: {control}), so its accuracy says little about distillation."
                )


def _by_word(table: Table, row: ResultRow, control: ResultRow, num_test: int) -> str:
    """Columns with the same judgement together."""
    words: dict[str, list[str]] = {}
    for column, ours, theirs in zip(columns_of(table), row.cells, control.cells, strict=True):
        word, points = _judgement(ours.as_row(), theirs.as_row(), num_test)
        words.setdefault(word, []).append(_heading(column) + points)
    if list(words) == [UNFINISHED]:
        return UNFINISHED
    return "; ".join(f"{word} with {', '.join(columns)}" for word, columns in words.items())


def _judgement(ours: Row | None, theirs: Row | None, num_test: int) -> tuple[str, str]:
    """In a word, and in points."""
    if ours is None or theirs is None:
        return UNFINISHED, ""
    points = f"{100 * (ours.mean - theirs.mean):+.1f} points"
    judgement = judge(ours, theirs, num_test=num_test)
    if judgement is None:
        return "no judgement from one seed", f" ({points})"
    word = "not shown to be better" if judgement.word == "no better" else judgement.word
    return word, f" ({points}; 95 % interval ± {100 * judgement.half_width:.1f})"
