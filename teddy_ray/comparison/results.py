"""What the cells of a comparison hold: our accuracies over seeds, the paper's beside them, and what follows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teddy_ray.comparison.file import Method, Table
from teddy_ray.comparison.paper import Dataset, Figure, load_paper
from teddy_ray.comparison.runs import Cell, Layout, columns_of

EQUAL_TREATMENT = {
    "distilled": "random_soft",
    "distilled_hard": "random_hard",
    "distilled_plain": "random_plain",
}
"""The row with random real images that were treated as a row's distilled ones."""

MORE_IMAGES = ("full_data",)
"""Rows whose students learn from more images than the others': no contestants."""

UNFINISHED = "not finished"


@dataclass(frozen=True)
class DataFacts:
    """What the data of a run is, validation part included."""

    num_classes: int
    num_train: int
    num_test: int
    image_size: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell. Accuracies are fractions, one per finished seed; steps, labels and split are None until one is.

    absent: a run is finished and has no such row.
    """

    accuracies: tuple[float, ...]
    num_seeds: int
    images_per_class: int
    student: str
    labels: str | None
    split: str | None
    steps: int | None
    runs: Mapping[int, str]
    """Names of the finished runs, by seed."""
    absent: bool
    paper: Figure | None
    leads: bool = False
    """Whether it is the best of its column by more than two standard errors."""

    @property
    def finished(self) -> bool:
        return len(self.accuracies) == self.num_seeds

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.finished else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.accuracies) if self.finished and self.num_seeds > 1 else None

    def __str__(self) -> str:
        if self.absent:
            return "not measured"
        if self.mean is None:
            return f"… ({len(self.accuracies)} of {self.num_seeds})" if self.accuracies else "…"
        return f"{self.mean:.4f}" + (f" ± {self.std:.4f}" if self.std is not None else "")


@dataclass(frozen=True)
class ResultRow:
    """A row of ours."""

    method: Method
    cells: tuple[Result, ...]

    @property
    def labels(self) -> str:
        """What its students learn from, as soon as one is finished."""
        return next((cell.labels for cell in self.cells if cell.labels), "")


@dataclass(frozen=True)
class PaperRow:
    """A method of the paper that no row of ours runs."""

    title: str
    setting: str
    cells: tuple[Figure | None, ...]


@dataclass(frozen=True)
class ResultTable:
    """A table with what it says."""

    table: Table
    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    paper_rows: tuple[PaperRow, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]


def result_tables(
    layout: Layout, summaries: Mapping[str, Mapping[str, Any]], facts: Mapping[str, DataFacts]
) -> tuple[ResultTable, ...]:
    """The tables as far as runs are finished. summaries, facts: by name of the run; facts of all runs."""
    tables = []
    for t, table in enumerate(layout.comparison.tables):
        reasons: dict[str, None] = {}
        rows = []
        for r, method in enumerate(layout.comparison.rows):
            cells = []
            for cell in layout.of(t, r):
                figure, reason = _beside(table, method, cell, facts[cell.runs[0].name])
                cells.append(_result(cell, summaries, figure))
                reasons |= {reason: None} if reason else {}
            rows.append(ResultRow(method, tuple(cells)))
        paper_rows = () if reasons else tuple(_paper_rows(layout, t))
        rows = _crown(rows)
        tables.append(
            ResultTable(
                table,
                tuple(_heading(column) for column in columns_of(table)),
                tuple(rows),
                paper_rows,
                tuple(_verdicts(table, rows)),
                tuple(reasons) or tuple(_notes(table, rows, paper_rows, layout)),
            )
        )
    return tuple(tables)


def two_standard_errors(first: Result, second: Result) -> float | None:
    """Of the difference of two means; None where a mean has no spread to tell."""
    if first.std is None or second.std is None:
        return None
    return 2 * math.sqrt(first.std**2 / first.num_seeds + second.std**2 / second.num_seeds)


def _result(cell: Cell, summaries: Mapping[str, Mapping[str, Any]], figure: Figure | None) -> Result:
    accuracies, runs, row, absent = [], {}, None, False
    for run, key in cell.sources():
        if run.name in summaries:
            runs[run.seed] = run.name
            row = summaries[run.name]["accuracy"].get(key)
            if row is None:
                absent = True
            else:
                accuracies.append(row["mean"])
    return Result(
        accuracies=tuple(accuracies),
        num_seeds=len(cell.runs),
        images_per_class=cell.images_per_class,
        student=cell.student,
        labels=row["labels"] if row else None,
        split=row["split"] if row else None,
        steps=row["student_steps"] if row else None,
        runs=runs,
        absent=absent,
        paper=figure,
    )


def _heading(column: int | str) -> str:
    if isinstance(column, str):
        return column
    return f"{column} image{'s' if column != 1 else ''} per class"


# -- beside the paper ------------------------------------------------------------------------------------------------


def _beside(table: Table, method: Method, cell: Cell, facts: DataFacts) -> tuple[Figure | None, str | None]:
    """The paper's figure for a cell of the same setting, or why no figure can stand in the table at all."""
    if table.paper is None:
        return None, None
    paper = load_paper()
    dataset = paper.datasets[table.paper.dataset]
    if differences := _differences(facts, dataset):
        return None, f"The paper's figures are left out: the data is not {dataset.title}: {differences}."
    if method.paper is None:
        return None, None
    return paper.figure(method.paper, table.paper.dataset, cell.images_per_class, cell.student), None


def _differences(facts: DataFacts, dataset: Dataset) -> str:
    names = {
        "num_classes": "classes",
        "num_train": "training images",
        "num_test": "test images",
        "image_size": "pixels a side",
    }
    return ", ".join(
        f"{getattr(facts, key):,} {name} instead of {getattr(dataset, key):,}"
        for key, name in names.items()
        if getattr(facts, key) != getattr(dataset, key)
    )


def _paper_rows(layout: Layout, t: int) -> Iterator[PaperRow]:
    """Methods without a row of ours. Where columns are students, only figures of these; otherwise of their own one."""
    table = layout.comparison.tables[t]
    if table.paper is None:
        return
    paper, dataset = load_paper(), table.paper.dataset
    ours = {method.paper for method in layout.comparison.rows}
    for name, method in paper.methods.items():
        own = paper.own_student(name, dataset)
        if name in ours or own is None:
            continue
        figures = tuple(
            paper.figure(name, dataset, cell.images_per_class, cell.student if table.columns.students else own)
            for cell in layout.of(t, 0)
        )
        if any(figures):
            student = "" if table.columns.students else f"{paper.students[own]}, "
            yield PaperRow(method.title, f"{student}{method.labels} labels", figures)


def _notes(table: Table, rows: Sequence[ResultRow], paper_rows: Sequence[PaperRow], layout: Layout) -> Iterator[str]:
    """Where the figures that are not ours come from, and what is not the same."""
    paper = load_paper()
    figures = [cell.paper for row in rows for cell in row.cells] + [cell for row in paper_rows for cell in row.cells]
    shown = [figure for figure in figures if figure is not None]
    if table.paper is None:
        return
    title = paper.datasets[table.paper.dataset].title
    if not shown:
        yield f"There are no figures of the paper on {title} for these images per class and students."
        return
    for mark, where in (("paper", f"in {paper.citation}"), ("published", "elsewhere, as the literature cites them")):
        methods = dict.fromkeys(figure.method for figure in shown if figure.mark == mark)
        if methods:
            yield (
                f"({mark}): not measured here but published {where}, on {title}, after the students' training of that "
                f"publication ({_training(methods)})."
            )
    epochs = dict.fromkeys(f"{run.evaluation.epochs:,}" for run in layout.runs)
    other = ", but for the rows that name a student of their own" if paper_rows and not table.columns.students else ""
    held = dict.fromkeys(f"{run.data.validation:g}" for run in layout.runs)
    yield (
        f"Data set, images per class and student are the same{other}. Ours: students of {' or '.join(epochs)} epochs "
        f"on the labels that the row names; a share of {' or '.join(held)} of the training images is held out as "
        "validation part."
    )


def _training(methods: Iterable[str]) -> str:
    """How students of published methods were trained, those of equal training together."""
    titles: dict[str, list[str]] = {}
    for name in methods:
        method = load_paper().methods[name]
        titles.setdefault(method.training, []).append(method.title)
    return "; ".join(f"{', '.join(of_these)}: {training}" for training, of_these in titles.items())


# -- what follows ----------------------------------------------------------------------------------------------------


def _crown(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Mark the best cell of each column where all are finished and it leads each other by two standard errors."""
    columns = list(zip(*(row.cells for row in rows), strict=True))
    leaders = [_leader([r for r, row in enumerate(rows) if not _is_whole(row.method)], column) for column in columns]
    return [
        ResultRow(
            row.method,
            tuple(
                Result(**{**vars(cell), "leads": leader == r}) for cell, leader in zip(row.cells, leaders, strict=True)
            ),
        )
        for r, row in enumerate(rows)
    ]


def _is_whole(method: Method) -> bool:
    return method.row.partition("@")[0] in MORE_IMAGES


def _leader(contestants: Sequence[int], column: Sequence[Result]) -> int | None:
    if len(contestants) < 2 or any(column[r].mean is None for r in contestants):
        return None
    best = max(contestants, key=lambda r: column[r].mean or 0.0)
    for other in contestants:
        noise = two_standard_errors(column[best], column[other])
        if other != best and (noise is None or not _gap(column[best], column[other]) > noise):
            return None
    return best


def _gap(first: Result, second: Result) -> float:
    assert first.mean is not None
    assert second.mean is not None
    return first.mean - second.mean


def _verdicts(table: Table, rows: Sequence[ResultRow]) -> Iterator[str]:
    """A sentence for each distilled row: against random real images under equal labels, column by column."""
    for row in rows:
        name, at, epochs = row.method.row.partition("@")
        if name not in EQUAL_TREATMENT:
            continue
        partner = (row.method.recipe, row.method.set, EQUAL_TREATMENT[name] + at + epochs)
        control = next((o for o in rows if (o.method.recipe, o.method.set, o.method.row) == partner), None)
        if control is None:
            yield (
                f"{row.method.title}: no row shows random real images under its labels "
                f"(row: {partner[2]}), so its accuracy says little about distillation."
            )
            continue
        yield f"{row.method.title} against random real images under equal labels: {_by_word(table, row, control)}."


def _by_word(table: Table, row: ResultRow, control: ResultRow) -> str:
    """Columns with the same judgement together."""
    words: dict[str, list[str]] = {}
    for column, ours, theirs in zip(columns_of(table), row.cells, control.cells, strict=True):
        word, points = _judgement(ours, theirs)
        words.setdefault(word, []).append(_heading(column) + points)
    if list(words) == [UNFINISHED]:
        return UNFINISHED
    return "; ".join(f"{word} with {', '.join(columns)}" for word, columns in words.items())


def _judgement(ours: Result, random: Result) -> tuple[str, str]:
    """In a word, and in points."""
    if ours.mean is None or random.mean is None:
        return UNFINISHED, ""
    gain = _gap(ours, random)
    noise = two_standard_errors(ours, random)
    points = f"{100 * gain:+.1f} points"
    if noise is None:
        return "no judgement from one seed", f" ({points})"
    word = "better" if gain > noise else "no better" if gain >= -noise else "worse"
    return word, f" ({points}, two standard errors {100 * noise:.1f})"
