"""Published figures beside a table of ours: only where the setting is the same, and with what is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from teddy_ray.comparison.file import Method, Table
from teddy_ray.comparison.paper import Dataset, Figure, load_paper
from teddy_ray.comparison.runs import Cell, Layout
from teddy_ray.rows import ROWS


@dataclass(frozen=True)
class DataShape:
    """What the data of a table is, validation part included."""

    num_classes: int
    num_train: int
    num_test: int
    image_size: int
    channels: int


@dataclass(frozen=True)
class PaperRow:
    """A method of the paper that no row of ours runs."""

    title: str
    setting: str
    cells: tuple[Figure | None, ...]


@dataclass(frozen=True)
class Beside:
    """What stands beside a table's own rows, all of which have data of one shape."""

    layout: Layout
    index: int
    shape: DataShape

    @property
    def table(self) -> Table:
        return self.layout.comparison.tables[self.index]

    def figure(self, method: Method, cell: Cell) -> Figure | None:
        """The published figure for a cell of the same setting."""
        name = published_as(method)
        if name is None or self.table.paper is None or self._other_data():
            return None
        return load_paper().figure(name, self.table.paper.dataset, cell.images_per_class, cell.student)

    def rows(self) -> tuple[PaperRow, ...]:
        """Methods without a row of ours. Where columns are students, figures of these; otherwise of their own one."""
        if self.table.paper is None or self._other_data():
            return ()
        paper, dataset = load_paper(), self.table.paper.dataset
        ours = {published_as(method) for method in self.layout.comparison.rows}
        rows = []
        for name, method in paper.methods.items():
            own = paper.own_student(name, dataset)
            if name in ours or own is None:
                continue
            figures = tuple(
                paper.figure(name, dataset, cell.images_per_class, cell.student if self.table.columns.students else own)
                for cell in self.layout.of(self.index, 0)
            )
            if shown := [figure for figure in figures if figure is not None]:
                student = [] if self.table.columns.students else [paper.students[own]]
                notes = dict.fromkeys(figure.note for figure in shown if figure.note)
                rows.append(PaperRow(method.title, ", ".join([*student, f"{method.labels} labels", *notes]), figures))
        return tuple(rows)

    def notes(self) -> Iterator[str]:
        """Where the figures that are not ours come from, and what is not the same."""
        if self.table.paper is None:
            return
        paper = load_paper()
        dataset = paper.datasets[self.table.paper.dataset]
        if differences := self._other_data():
            yield f"The paper's figures are left out: the data is not {dataset.title}: {differences}."
            return
        rows = self.rows()
        figures = [self.figure(method, cell) for method, cells in self._cells() for cell in cells]
        shown = [figure for figure in (*figures, *(each for row in rows for each in row.cells)) if figure is not None]
        if not shown:
            yield f"There are no figures of the paper on {dataset.title} for these images per class and students."
            return
        for mark, where in (
            ("paper", f"in {paper.citation}"),
            ("published", "elsewhere, as the literature cites them"),
        ):
            methods = dict.fromkeys(figure.method for figure in shown if figure.mark == mark)
            if methods:
                yield (
                    f"({mark}): not measured here but published {where}, on {dataset.title}, after the students' "
                    f"training of that publication ({_training(methods)})."
                )
        named = bool(rows) and (not self.table.columns.students or any(figure.note for figure in shown))
        held = dict.fromkeys(f"{cell.runs[0].data.validation:g}" for _, cells in self._cells() for cell in cells)
        other = ", but for what rows say of themselves" if named else ""
        yield (
            f"Data set, images per class and student are the same{other}. "
            f"Ours: students of {' or '.join(self._epochs())} epochs on the labels that the row names; a share of "
            f"{' or '.join(held)} of the training images is held out as validation part."
        )

    def _cells(self) -> Iterator[tuple[Method, list[Cell]]]:
        for r, method in enumerate(self.layout.comparison.rows):
            yield method, self.layout.of(self.index, r)

    def _epochs(self) -> list[str]:
        """Of the students of this table that learn from small sets."""
        found: set[int] = set()
        for method, cells in self._cells():
            name, _, epochs = method.row.partition("@")
            if ROWS[name].images is not None:
                found |= {int(epochs) if epochs else cell.runs[0].evaluation.epochs for cell in cells}
        return [f"{epochs:,}" for epochs in sorted(found)]

    def _other_data(self) -> str:
        """How the data differs from that of the published figures."""
        assert self.table.paper is not None
        return _differences(self.shape, load_paper().datasets[self.table.paper.dataset])


def published_as(method: Method) -> str | None:
    """The paper's method of a row, where both train students on the same images under labels of the same kind."""
    if method.paper is None:
        return None
    row = method.row.partition("@")[0]
    equal = row == ("random_hard" if method.paper == "random_hard" else "distilled")
    return method.paper if equal and ROWS[row].labels == load_paper().methods[method.paper].labels else None


def _differences(shape: DataShape, dataset: Dataset) -> str:
    names = {
        "num_classes": "classes",
        "num_train": "training images",
        "num_test": "test images",
        "image_size": "pixels a side",
        "channels": "channels",
    }
    return ", ".join(
        f"{getattr(shape, key):,} {name} instead of {getattr(dataset, key):,}"
        for key, name in names.items()
        if getattr(shape, key) != getattr(dataset, key)
    )


def _training(methods: Iterable[str]) -> str:
    """How students of published methods were trained, those of equal training together."""
    titles: dict[str, list[str]] = {}
    for name in methods:
        method = load_paper().methods[name]
        titles.setdefault(method.training, []).append(method.title)
    return "; ".join(f"{', '.join(of_these)}: {training}" for training, of_these in titles.items())
