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
from teddy_ray.image_sets import (
    ImageSet,
    LabelledSet,
    Shard,
    is_chosen,
    labelled_fingerprint,
    random_fingerprint,
    start_fingerprint,
)
from teddy_ray.pool_plan import DataFacts, Given, Member, PoolPlan
from teddy_ray.recipe import Recipe, result_fields
from teddy_ray.rows import Kind
from teddy_ray.student_plan import StudentRun, student_runs

CHUNKS, MIN_CHUNK = 64, 1000
"""chunk_size: auto makes so many of the data, each of so many images at least: a chunk begins with a batch that
nobody decoded ahead."""

CLASSES_PER_FILE = 10
"""Classes whose moments lie in one file, of all members."""

MERGE_TASKS = 64
"""At most so many merge the moments of chunks. Each opens every chunk."""

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
class Plan:
    """All work of a recipe on given data."""

    recipe: Recipe
    data: DataFacts
    given: Given | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    """Hash of the source of each architecture that is the user's own function."""
    split: Literal["test", "validation"] = "test"
    """What students are measured on. validation: that alone, as trials of a sweep are."""

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
        if synthesis.formation == 1:
            del fields["formation"]
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

    @property
    def label_members(self) -> tuple[Member, ...]:
        """The members that label."""
        return tuple(member for member in self.members if is_chosen(member, self.recipe.labels.members))

    @property
    def distilled(self) -> ImageSet:
        return self.image_set("distilled")

    def image_set(self, kind: Kind, draw: int | None = None) -> ImageSet:
        """A small set of images. draw: the seed of a random one."""
        formation = self.recipe.synthesis.formation
        if kind == "distilled":
            return ImageSet(kind, None, self.synthesis, formation)
        if kind == "start":
            return ImageSet(kind, None, start_fingerprint(self.recipe, self.data.train, self.pool), formation)
        assert draw is not None
        return ImageSet(kind, draw, random_fingerprint(self.recipe, self.data.train, draw))

    def labelled(self, images: ImageSet, *, plain: bool = False) -> LabelledSet:
        """A set with soft labels."""
        found = labelled_fingerprint(self.recipe, images, self.label_members, plain=plain)
        return LabelledSet(images, plain, found)

    @cached_property
    def labelled_controls(self) -> tuple[LabelledSet, ...]:
        """The sets, besides the distilled one, whose soft labels students need."""
        sets = {run.labelled: None for run in self.students if run.labelled}
        return tuple(labelled for labelled in sets if labelled.fingerprint != self.labels)

    def shards(self, labelled: LabelledSet) -> tuple[Shard, ...]:
        """The files of a labelled set, in the order of its rows."""
        return tuple(
            Shard(
                labelled.name,
                rows,
                fingerprint("labels", labelled=labelled.fingerprint, rows=[rows.start, rows.stop]),
            )
            for rows in blocks(self.num_images, self.recipe.labels.images_per_file)
        )

    def num_views(self, epochs: int) -> int:
        """How many views of each image students of soft labels see in so many epochs."""
        labels = self.recipe.labels
        return epochs if labels.averaged or labels.mode == "none" else min(labels.views, epochs)

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """Stable names of the rows of a set, which are ordered by class, then slot."""
        per_class = self.recipe.synthesis.images_per_class
        return tuple(f"{row // per_class:05d}-{row % per_class:05d}" for row in range(self.num_images))

    def image_labels(self, rows: range) -> list[int]:
        """Class indices of the rows of a set."""
        return [row // self.recipe.synthesis.images_per_class for row in rows]

    @property
    def labels(self) -> str:
        return self.labelled(self.distilled).fingerprint

    @cached_property
    def students(self) -> tuple[StudentRun, ...]:
        return tuple(student_runs(self))

    @cached_property
    def evaluation(self) -> str:
        return fingerprint("evaluation", students=[run.fingerprint for run in self.students])

    def stages(self) -> dict[str, str]:
        """Stage -> fingerprint, in the order of the pipeline."""
        return {stage: getattr(self, stage) for stage in STAGES}

    def work(self) -> dict[str, str]:
        """Stage -> what it does, in words: all of it, reused or not."""
        recipe = self.recipe
        num_train, num_members = sum(self.data.counts), len(self.members)
        num_epochs = sum(training.epochs for training in (*self.pool_plan.bases, *self.pool_plan.finetunings))
        num_measured = num_train if recipe.statistics.source == "moments" else 0
        rates = recipe.evaluation.learning_rate
        num_rates = len(rates) if isinstance(rates, tuple) else 1
        seen = sum((self.num_images if run.images else num_train) * run.epochs for run in self.students)
        image_steps = self.num_images * recipe.synthesis.steps * recipe.synthesis.models_per_step
        image_steps *= recipe.synthesis.formation**2
        views = recipe.labels.views if recipe.labels.mode != "none" else 0
        each_view = self.num_images * len(self.label_members)
        views_of_controls = sum(min(views, 1) if labelled.plain else views for labelled in self.labelled_controls)
        students = f"{seen * num_rates:,} images x epochs x students"
        if views_of_controls:
            students += f"; labels of controls: {each_view * views_of_controls:,} images x views x members"
        return {
            "pool": f"{num_train * num_epochs:,} images x epochs x trainings",
            "statistics": f"{num_measured * num_members:,} images x members",
            "synthesis": f"{image_steps:,} images x steps x models per step",
            "labels": f"{each_view * views:,} images x views x members",
            "evaluation": students,
        }

    @property
    def num_images(self) -> int:
        return len(self.data.classes) * self.recipe.synthesis.images_per_class

    @property
    def label_bytes(self) -> int:
        """Soft labels of the distilled set before Parquet's compression."""
        labels, num_classes = self.recipe.labels, len(self.data.classes)
        num_views = 1 if labels.averaged else labels.views
        each = {
            "fp16": 2 * num_classes,
            "top_k": labels.top_k * (2 + (1 if num_classes <= 2**8 else 2 if num_classes <= 2**16 else 4)),
            "none": 0,
        }
        return self.num_images * num_views * each[labels.mode]


def blocks(total: int | range, size: int) -> Iterator[range]:
    """Neighbouring numbers, from 0 or of a range, so many at a time."""
    numbers = range(total) if isinstance(total, int) else total
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
