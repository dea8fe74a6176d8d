"""Published figures, as data, and the setting that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

from teddy_ray.recipe import Count, Fraction, Part
from teddy_ray.recipe_file import check_part


class Dataset(Part):
    """What a data set has to be for figures on it to be comparable."""

    title: str
    num_classes: Count
    num_train: Count
    num_test: Count
    image_size: Count
    channels: Count


class Figures(Part):
    """Accuracies of one student on one data set, by images per class."""

    dataset: str
    student: str
    """By this package's name."""
    source: str
    """The table of the paper, or who else published them."""
    accuracy: dict[Count, Fraction]
    note: str = ""
    """What is not known of them."""


class PaperMethod(Part):
    """A method with its figures."""

    title: str
    labels: Literal["soft", "hard"]
    training: str
    """What is known of how its students were trained."""
    figures: tuple[Figures, ...]


@dataclass(frozen=True)
class Figure:
    """One published accuracy."""

    accuracy: float
    method: str
    source: str
    student: str
    note: str

    @property
    def mark(self) -> str:
        """Whose figure it is, as it stands behind the number."""
        return "paper" if self.source.startswith("Table") else "published"

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ({self.mark})"


class Paper(Part):
    """The paper whose tables these are."""

    citation: str
    datasets: dict[str, Dataset]
    students: dict[str, str]
    """The paper's names of students, by this package's."""
    methods: dict[str, PaperMethod]

    def figure(self, method: str, dataset: str, images_per_class: int, student: str) -> Figure | None:
        """The figure of exactly this setting."""
        for figures in self.methods[method].figures:
            if (figures.dataset, figures.student) == (dataset, student) and images_per_class in figures.accuracy:
                return Figure(figures.accuracy[images_per_class], method, figures.source, student, figures.note)
        return None

    def own_student(self, method: str, dataset: str) -> str | None:
        """The student of a method's first figures on a data set."""
        return next((each.student for each in self.methods[method].figures if each.dataset == dataset), None)


@cache
def load_paper() -> Paper:
    """The figures of paper.yaml."""
    text = files("teddy_ray.comparison").joinpath("paper.yaml").read_text()
    return check_part(Paper, yaml.safe_load(text), "paper.yaml")
