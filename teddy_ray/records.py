"""Accuracies as they go into tables: never without split, labels, number of draws and of student steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Score:
    """The accuracy of one student after its last epoch, as a fraction.

    row: of `rows.ROWS`, such as random_soft, or random_soft@900 for a further budget of 900 epochs.
    n_counts: what several such scores are independent draws of. validation: the same student's accuracy on the
    validation part.
    """

    row: str
    student: str
    accuracy: float
    validation: float
    labels: Literal["soft", "hard"]
    split: str
    steps: int
    n_counts: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: mean and sample standard deviation over n students, fractions.

    std is None where n is 1. n_counts says what the n are independent draws of. epoch is always the last.
    validation: the mean of the same students on the validation part; None where tables of runs are summed up.
    """

    mean: float
    std: float | None
    n: int
    n_counts: str
    labels: str
    split: str
    student: str
    student_steps: int
    validation: float | None
    epoch: Literal["last"] = "last"

    def __str__(self) -> str:
        spread = f" ± {self.std:.4f}" if self.std is not None else ""
        return f"{self.mean:.4f}{spread}"


def tabulate(scores: Iterable[Score]) -> dict[str, Row]:
    """Rows by name: `distilled` for the first student, `distilled/<student>` for further ones."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.row, score.student), []).append(score)
    first_student = next(iter(groups))[1]
    return {
        row if student == first_student else f"{row}/{student}": _summarise(group)
        for (row, student), group in groups.items()
    }


def _summarise(group: Sequence[Score]) -> Row:
    first = group[0]
    assert all((score.labels, score.split, score.steps) == (first.labels, first.split, first.steps) for score in group)
    accuracies = [score.accuracy for score in group]
    return Row(
        mean=statistics.fmean(accuracies),
        std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        n=len(accuracies),
        n_counts=first.n_counts,
        labels=first.labels,
        split=first.split,
        student=first.student,
        student_steps=first.steps,
        validation=statistics.fmean(score.validation for score in group),
    )
