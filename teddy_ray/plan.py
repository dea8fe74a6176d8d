"""What a recipe comes to on given data: every piece of work with its fingerprint, before anything runs.

A fingerprint covers the result fields of its own part, the version of its algorithm, the fingerprints it reads and
the data's identity, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from teddy_ray.fingerprints import fingerprint
from teddy_ray.pool_plan import DataFacts, Given, Member, PoolPlan
from teddy_ray.recipe import Recipe, result_fields

CHUNKS, MIN_CHUNK = 64, 1000
"""chunk_size: auto makes so many of the data, each of so many images at least: a chunk begins with a batch that
nobody decoded ahead."""

CLASSES_PER_FILE = 10
"""Classes whose moments lie in one file, of all members."""

STAGES = ("pool", "statistics", "synthesis", "labels", "evaluation")


@dataclass(frozen=True)
class ClassRange:
    """Neighbouring classes, whose moments lie together."""

    classes: range
    fingerprint: str


@dataclass(frozen=True)
class Unit:
    """A batch of synthetic images optimised together: a range of classes times a range of IPC slots."""

    classes: range
    slots: range
    fingerprint: str

    @property
    def name(self) -> str:
        return f"classes {self.classes[0]}-{self.classes[-1]} slots {self.slots[0]}-{self.slots[-1]}"

    @property
    def num_images(self) -> int:
        return len(self.classes) * len(self.slots)


@dataclass(frozen=True)
class ImageSet:
    """A small set of images that is labelled and trained on. draw: seed of a random draw, None for the distilled set.

    fingerprint identifies the images, labelled the images with their soft labels.
    """

    name: str
    draw: int | None
    fingerprint: str
    labelled: str


@dataclass(frozen=True)
class Shard:
    """A file of a labelled set: a range of its rows."""

    set_name: str
    rows: range
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.set_name} rows {self.rows[0]}-{self.rows[-1]}"


@dataclass(frozen=True)
class StudentRun:
    """One student: which row of the table it counts for, what it learns from, and with which labels."""

    row: str
    student: str
    seed: int
    images: ImageSet | None  # None: the whole training set
    labels: Literal["soft", "hard"]
    epochs: int
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.row} {self.student} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All work of a recipe on given data."""

    recipe: Recipe
    data: DataFacts
    given: Given | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    """Hash of the source of each architecture that is the user's own function."""

    @cached_property
    def pool_plan(self) -> PoolPlan:
        return PoolPlan(self.recipe, self.data, self.given, self.code)

    @property
    def members(self) -> tuple[Member, ...]:
        return self.pool_plan.members

    @property
    def pool(self) -> str:
        return self.pool_plan.fingerprint

    @cached_property
    def statistics(self) -> str:
        if self.recipe.statistics.source == "buffers":
            return fingerprint("statistics", source="buffers", pool=self.pool)
        fields = result_fields(self.recipe.statistics)
        del fields["scope"], fields["blend"]  # how moments are used, not what they are
        fields["chunk_size"] = self.chunk_size
        if self.recipe.statistics.view == "augmented":
            fields["augmentation"] = result_fields(self.recipe.synthesis.augmentation)
            fields["seed"] = self.recipe.seed
        return fingerprint("statistics", fields=fields, pool=self.pool, train=self.data.train)

    @property
    def chunk_size(self) -> int:
        """Images per chunk of the statistics. From the data alone, never from the number of workers."""
        part = self.recipe.statistics
        if part.chunk_size != "auto":
            return part.chunk_size
        images = max(MIN_CHUNK, -(-sum(self.data.counts) // CHUNKS))
        return -(-images // part.batch_size) * part.batch_size

    def chunks(self) -> Iterator[range]:
        """Rows of the training data, in its own order, that the statistics take at a time."""
        return blocks(sum(self.data.counts), self.chunk_size)

    def class_ranges(self) -> tuple[ClassRange, ...]:
        """The artifacts that hold the moments, in the order of the classes."""
        return tuple(
            ClassRange(
                classes, fingerprint("statistics", statistics=self.statistics, classes=[classes.start, classes.stop])
            )
            for classes in blocks(len(self.data.classes), CLASSES_PER_FILE)
        )

    @property
    def num_units(self) -> int:
        synthesis = self.recipe.synthesis
        groups = -(-len(self.data.classes) // synthesis.classes_per_unit)
        return groups * -(-synthesis.images_per_class // synthesis.slots_per_unit)

    def units(self) -> Iterator[Unit]:
        """The units in the order in which they are handed out: neighbours are of disjoint classes."""
        synthesis = self.recipe.synthesis
        fields = result_fields(synthesis)
        # the unit names its own classes and slots, so that a larger IPC finds those of a smaller one
        del fields["images_per_class"], fields["classes_per_unit"], fields["slots_per_unit"]
        if synthesis.start != "mosaic":
            del fields["mosaic"]
        if synthesis.curriculum.crop_scale is None and synthesis.curriculum.image_size is None:
            del fields["curriculum"]
        fields["scope"] = self.recipe.statistics.scope
        if self.recipe.statistics.scope == "blend":
            fields["blend"] = self.recipe.statistics.blend
        for slots in blocks(synthesis.images_per_class, synthesis.slots_per_unit):
            for classes in blocks(len(self.data.classes), synthesis.classes_per_unit):
                yield Unit(
                    classes,
                    slots,
                    fingerprint(
                        "unit",
                        fields=fields,
                        seed=self.recipe.seed,
                        classes=list(classes),
                        slots=list(slots),
                        statistics=self.statistics,
                        train=self.data.train,
                    ),
                )

    @cached_property
    def synthesis(self) -> str:
        digest = hashlib.sha256()
        for unit in self.units():
            digest.update(unit.fingerprint.encode())
        return fingerprint("synthesis", units=digest.hexdigest())

    @cached_property
    def distilled(self) -> ImageSet:
        return ImageSet("distilled", None, self.synthesis, self._labelled(self.synthesis))

    @cached_property
    def random_sets(self) -> tuple[ImageSet, ...]:
        """One random draw of real images per evaluation seed, where a control asks for it."""
        if not {"random_soft", "random_hard"} & set(self.recipe.evaluation.controls):
            return ()
        per_class = self.recipe.synthesis.images_per_class
        sets = []
        for seed in self.recipe.evaluation.seeds:
            images = fingerprint("set", random=seed, per_class=per_class, train=self.data.train)
            sets.append(ImageSet(f"random draw {seed}", seed, images, self._labelled(images)))
        return tuple(sets)

    def shards(self, images: ImageSet) -> tuple[Shard, ...]:
        """The files of a labelled set, in the order of its rows."""
        return tuple(
            Shard(images.name, rows, fingerprint("labels", labelled=images.labelled, rows=[rows.start, rows.stop]))
            for rows in blocks(self.num_images, self.recipe.labels.images_per_file)
        )

    def image_ids(self, rows: range) -> list[str]:
        """Stable names of the rows of a set, which are ordered by class, then slot."""
        per_class = self.recipe.synthesis.images_per_class
        return [f"{row // per_class:05d}-{row % per_class:05d}" for row in rows]

    def image_labels(self, rows: range) -> list[int]:
        """Class indices of the rows of a set."""
        return [row // self.recipe.synthesis.images_per_class for row in rows]

    def _labelled(self, images: str) -> str:
        fields = result_fields(self.recipe.labels)
        return fingerprint("labels", fields=fields, seed=self.recipe.seed, pool=self.pool, images=images)

    @property
    def labels(self) -> str:
        return self.distilled.labelled

    @cached_property
    def students(self) -> tuple[StudentRun, ...]:
        evaluation = self.recipe.evaluation
        fields = result_fields(evaluation)
        for key in ("students", "seeds", "controls", "epochs", "full_data_epochs"):
            del fields[key]  # each student names its own

        def run(
            row: str, student: str, seed: int, images: ImageSet | None, labels: Literal["soft", "hard"]
        ) -> StudentRun:
            epochs = evaluation.epochs if images else evaluation.full_data_epochs
            views = min(self.recipe.labels.views, epochs)
            drawn = {
                "images": images.fingerprint if images else self.data.train,
                "seed": self.recipe.seed,
                "views": views,
            }
            inputs = {"set": images.labelled} if images and labels == "soft" else drawn
            return StudentRun(
                row,
                student,
                seed,
                images,
                labels,
                epochs,
                fingerprint(
                    "student",
                    fields=fields,
                    student=student,
                    student_seed=seed,
                    epochs=epochs,
                    labels=labels,
                    augmentation=result_fields(self.recipe.labels.augmentation),
                    test=self.data.test,
                    code=self.code.get(student),
                    **inputs,
                ),
            )

        runs = []
        draws = dict(zip(evaluation.seeds, self.random_sets, strict=False))
        for student in evaluation.students:
            for row in ("distilled", *evaluation.controls):
                for seed in evaluation.seeds:
                    images = {"distilled": self.distilled, "full_data": None}.get(row, draws.get(seed))
                    labels: Literal["soft", "hard"] = "soft" if row in ("distilled", "random_soft") else "hard"
                    runs.append(run(row, student, seed, images, labels))
        return tuple(runs)

    @cached_property
    def evaluation(self) -> str:
        return fingerprint("evaluation", students=[run.fingerprint for run in self.students])

    def stages(self) -> dict[str, str]:
        """Stage -> fingerprint, in the order of the pipeline."""
        return {stage: getattr(self, stage) for stage in STAGES}

    def work(self) -> dict[str, tuple[int, str]]:
        """Stage -> (amount, of what), all of it, reused or not."""
        recipe = self.recipe
        num_train, num_members = sum(self.data.counts), len(self.members)
        num_epochs = sum(training.epochs for training in (*self.pool_plan.bases, *self.pool_plan.finetunings))
        num_measured = num_train if recipe.statistics.source == "moments" else 0
        student_images = sum((self.num_images if run.images else num_train) * run.epochs for run in self.students)
        image_steps = self.num_images * recipe.synthesis.steps * recipe.synthesis.models_per_step
        return {
            "pool": (num_train * num_epochs, "images x epochs x trainings"),
            "statistics": (num_measured * num_members, "images x members"),
            "synthesis": (image_steps, "images x steps x models per step"),
            "labels": (self.num_images * recipe.labels.views * num_members, "images x views x members"),
            "evaluation": (student_images, "images x epochs x students"),
        }

    @property
    def num_images(self) -> int:
        return len(self.data.classes) * self.recipe.synthesis.images_per_class

    @property
    def label_bytes(self) -> int:
        """Soft labels of the distilled set as float16, before Parquet's compression."""
        return self.num_images * self.recipe.labels.views * len(self.data.classes) * 2


def blocks(total: int | range, size: int) -> Iterator[range]:
    """Neighbouring numbers, from 0 or of a range, so many at a time."""
    numbers = range(total) if isinstance(total, int) else total
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
