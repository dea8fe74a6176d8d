"""The work of a plan, cut as it is handed out: how many operations each piece takes, and which pieces bar each other.

Operations are floating-point ones of convolutions and matrix products, a multiply-add being two. A step of training
takes three times a forward pass, a step of the synthesis twice: its models are frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from teddy_ray.image_sets import LabelledSet
from teddy_ray.models import outline
from teddy_ray.plan import STAGES, Plan
from teddy_ray.pool_plan import Member, Training
from teddy_ray.student_plan import StudentRun
from teddy_ray.taps import Taps

TRAINING_STEP, SYNTHESIS_STEP = 3, 2
"""Passes that a step costs, in forward ones."""


@dataclass(frozen=True)
class Job:
    """What is handed out as a whole.

    passes: of batches through models, there or back. decoded: images read and decoded for it. key: jobs of one key
    never run at the same time. fingerprints: of the artifacts it publishes; without any it is never found done.
    """

    name: str
    flops: float
    key: Hashable
    passes: float
    decoded: int = 0
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Jobs of one kind: the next phase begins when all are done.

    stage: to which it belongs. like: the stage of whose kind its work is, and whose workers do it.
    """

    stage: str
    like: str
    what: str
    jobs: tuple[Job, ...]

    @property
    def num_parallel(self) -> int:
        """How many of its jobs may run at once."""
        return len({job.key for job in self.jobs})


@functools.cache
def forward_flops(architecture: str, num_classes: int, channels: int, image_size: int) -> float:
    """Operations of a forward pass of one image."""
    model = outline(architecture, num_classes=num_classes, channels=channels, image_size=image_size).eval()
    image = torch.zeros(1, channels, image_size, image_size, device=model.mean.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return float(counter.get_total_flops())


@functools.cache
def _tapped_channels(architecture: str, num_classes: int, channels: int, image_size: int) -> int:
    model = outline(architecture, num_classes=num_classes, channels=channels, image_size=image_size).eval()
    with torch.no_grad(), Taps(model) as taps:
        model(torch.zeros(2, channels, image_size, image_size, device=model.mean.device))
        return sum(activation.shape[1] for activation in taps.take())


def phases(plan: Plan) -> tuple[Phase, ...]:
    """All work in the order in which it is done, whether it is there already or not."""
    models = plan.pool_plan
    return (
        Phase("pool", "pool", "bases", tuple(_training(plan, one) for one in models.bases)),
        Phase("pool", "pool", "fine-tunings", tuple(_training(plan, one) for one in models.finetunings)),
        Phase("statistics", "statistics", "chunks", tuple(_chunks(plan))),
        Phase("synthesis", "synthesis", "units", tuple(_units(plan))),
        Phase("labels", "labels", "files", tuple(_files(plan, [plan.labelled(plan.distilled)]))),
        Phase("evaluation", "labels", "files of controls", tuple(_files(plan, plan.labelled_controls))),
        Phase("evaluation", "evaluation", "students", tuple(_student(plan, run) for run in plan.students)),
    )


def flops_of_stages(plan: Plan) -> dict[str, float]:
    """Stage -> operations of its own kind of work: labels of controls, which the evaluation asks for, do not count."""
    flops = dict.fromkeys(STAGES, 0.0)
    for phase in phases(plan):
        if phase.stage == phase.like:
            flops[phase.stage] += sum(job.flops for job in phase.jobs)
    return flops


def moment_bytes(plan: Plan) -> int:
    """Bytes of the moments of one class under all members: mean and squared deviations, 64 bits each."""
    size = (len(plan.data.classes), plan.recipe.data.channels, plan.recipe.data.image_size)
    return sum(16 * _tapped_channels(member.architecture, *size) for member in plan.members)


def _forward(plan: Plan, architecture: str, ratio: float = 0.0) -> float:
    """ratio: share of the channels that is pruned, of which operations fall with the square."""
    data = plan.recipe.data
    whole = forward_flops(architecture, len(plan.data.classes), data.channels, data.image_size)
    return whole * (1 - ratio) ** 2


def _ensemble(plan: Plan, members: Iterable[Member]) -> float:
    return sum(_forward(plan, member.architecture, member.ratio) for member in members)


def _training(plan: Plan, training: Training) -> Job:
    pool, data, num = plan.recipe.pool, plan.recipe.data, sum(plan.data.counts)
    recalibrations = len(training.members) if pool.recalibrate and training.members[0] in plan.members else 0
    seen = num * (training.epochs * TRAINING_STEP + recalibrations) + len(training.members) * plan.data.num_validation
    kept = num * data.channels * data.image_size**2 <= pool.keep_bytes
    return Job(
        name=training.name,
        flops=seen * _forward(plan, training.architecture, training.ratio),
        key=training.name,
        passes=training.epochs * _batches(num, pool.batch_size) * TRAINING_STEP,
        decoded=num * (1 if kept else training.epochs + recalibrations),
        fingerprints=tuple(member.fingerprint for member in training.members),
    )


def _chunks(plan: Plan) -> Iterator[Job]:
    part = plan.recipe.statistics
    if part.source == "buffers":
        return
    each = _ensemble(plan, plan.members)
    for rows in plan.chunks():
        passes = _batches(len(rows), part.batch_size) * len(plan.members)
        yield Job(f"rows {rows.start}", len(rows) * each, key=rows.start, passes=passes, decoded=len(rows))


def _units(plan: Plan) -> Iterator[Job]:
    part = plan.recipe.synthesis
    passes = part.steps * part.models_per_step * SYNTHESIS_STEP
    wholes = part.formation**2  # to an image
    small, size = part.curriculum.image_size, plan.recipe.data.image_size
    share = 1.0 if small is None else 1 - part.curriculum.share * (1 - (small / size) ** 2)
    each = passes * share * _ensemble(plan, plan.members) / len(plan.members)
    for unit in plan.units():
        yield Job(
            unit.name,
            unit.num_images * wholes * each,
            key=unit.classes[0],
            passes=passes,
            fingerprints=(unit.fingerprint,),
        )


def _files(plan: Plan, sets: Iterable[LabelledSet]) -> Iterator[Job]:
    part = plan.recipe.labels
    each = _ensemble(plan, plan.label_members)
    for labelled in sets:
        num_views = 0 if part.mode == "none" else 1 if labelled.plain else part.views
        for shard in plan.shards(labelled):
            yield Job(
                shard.name,
                len(shard.rows) * num_views * each,
                key=shard.name,
                passes=_batches(len(shard.rows), part.batch_size) * num_views * len(plan.label_members),
                fingerprints=(shard.fingerprint,),
            )


def _student(plan: Plan, run: StudentRun) -> Job:
    part, data, num = plan.recipe.evaluation, plan.recipe.data, sum(plan.data.counts)
    rates = len(part.learning_rate) if isinstance(part.learning_rate, tuple) else 1
    num_images = plan.num_images if run.images else num
    own = _forward(plan, run.student)
    asks = run.labelled is not None and plan.recipe.labels.mode == "none"  # the members, for lack of labels
    asked = plan.label_members if asks else ()
    measured = plan.data.num_test + (rates * plan.data.num_validation if rates > 1 else 0)
    kept = num * data.channels * data.image_size**2 <= part.keep_bytes
    steps = rates * run.epochs * _batches(num_images, part.batch_size)
    seen = rates * run.epochs * num_images
    return Job(
        name=run.name,
        flops=seen * (TRAINING_STEP * own + _ensemble(plan, asked)) + measured * own,
        key=run.name,
        passes=steps * (TRAINING_STEP + len(asked)),
        decoded=measured + (0 if run.images else num * (1 if kept else rates * run.epochs)),
        fingerprints=(run.fingerprint,),
    )


def _batches(num: int, size: int) -> int:
    return -(-num // size)
