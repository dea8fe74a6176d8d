"""The students of a plan: which row of the table each counts for, what it learns from, and with which labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teddy_ray.fingerprints import fingerprint
from teddy_ray.image_sets import ImageSet, LabelledSet
from teddy_ray.recipe import result_fields
from teddy_ray.rows import ROWS, RowKind

if TYPE_CHECKING:
    from teddy_ray.plan import Plan


@dataclass(frozen=True)
class StudentRun:
    """One student. images: None for the whole training set. labelled: the soft labels, None for hard ones.

    longer: whether it belongs to a further budget, which has rows of its own.
    """

    row: str
    student: str
    seed: int
    images: ImageSet | None
    labelled: LabelledSet | None
    epochs: int
    longer: bool
    fingerprint: str

    @property
    def kind(self) -> RowKind:
        return ROWS[self.row]

    @property
    def name(self) -> str:
        return f"{self.row} {self.student} seed {self.seed}" + (f" {self.epochs} epochs" if self.longer else "")


def student_runs(plan: Plan) -> Iterator[StudentRun]:
    """All students, in the order of the table."""
    evaluation = plan.recipe.evaluation
    rows = [row for row in ROWS if row == "distilled" or row in evaluation.controls]
    for student in evaluation.students:
        for budget in (evaluation.epochs, *evaluation.longer_epochs):
            for row in rows:
                longer = budget != evaluation.epochs
                if longer and ROWS[row].images is None:
                    continue  # the whole training set has a number of epochs of its own
                for seed in evaluation.seeds:
                    yield _run(plan, row, student, seed, budget, longer)


def _run(plan: Plan, row: str, student: str, seed: int, budget: int, longer: bool) -> StudentRun:
    kind = ROWS[row]
    images = plan.image_set(kind.images, seed) if kind.images else None
    labelled = plan.labelled(images, plain=kind.plain) if images and kind.labels == "soft" else None
    epochs = budget if images else plan.recipe.evaluation.full_data_epochs
    identity = fingerprint(
        "student",
        fields=_fields(plan, kind),
        student=student,
        student_seed=seed,
        epochs=epochs,
        labels=kind.labels,
        seen=_seen(plan, images, labelled, epochs),
        measured=[plan.data.validation, *([plan.data.test] if plan.split == "test" else [])],
        code=plan.code.get(student),
    )
    return StudentRun(row, student, seed, images, labelled, epochs, longer, identity)


def _fields(plan: Plan, kind: RowKind) -> dict[str, Any]:
    """What of the students' recipe a row's students follow: what they do not use, they do not change with."""
    evaluation = plan.recipe.evaluation
    fields = result_fields(evaluation)
    unused = ["students", "seeds", "controls", "epochs", "longer_epochs", "full_data_epochs"]  # each names its own
    if kind.labels == "hard":
        unused += ["loss", "ce_weight"]
    if evaluation.optimiser != "sgd":
        unused.append("momentum")
    if evaluation.schedule != "steps":
        unused.append("steps")
    return {key: value for key, value in fields.items() if key not in unused}


def _seen(plan: Plan, images: ImageSet | None, labelled: LabelledSet | None, epochs: int) -> dict[str, Any]:
    """What a student sees: the views of images, and their labels."""
    labels = plan.recipe.labels
    if labelled:
        views = 1 if labelled.plain else plan.num_views(epochs)
        return {"set": labelled.fingerprint, "views": views}
    return {
        "images": images.fingerprint if images else plan.data.train,
        "seed": plan.recipe.seed,
        "augmentation": result_fields(labels.augmentation),
        "cutmix": labels.cutmix,
    }
