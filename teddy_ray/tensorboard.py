"""What a stage measured, as TensorBoard reads it: runs/<name>/tensorboard/<stage>/, where the recipe asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tensorboardX import SummaryWriter

from teddy_ray.plan import Plan
from teddy_ray.storage import Storage

TENSORBOARD = "tensorboard"


class Point(NamedTuple):
    """A scalar of a curve. of: what it belongs to, such as a unit; points of one stand together."""

    curve: str
    of: str
    step: int
    value: float


def write_events(plan: Plan, storage: Storage, stage: str) -> None:
    """Write the files of a finished stage, in place of earlier ones."""
    target = f"runs/{plan.recipe.name}/{TENSORBOARD}/{stage}"
    storage.delete_folder(target)
    for of, points in groupby(_points(plan, storage, stage), key=lambda point: point.of):
        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for point in points:
                    writer.add_scalar(f"{stage}/{point.curve}", point.value, point.step)
            for path in Path(folder).iterdir():
                storage.write(f"{target}/{_file_name(of)}/{path.name}", path.read_bytes())


def _points(plan: Plan, storage: Storage, stage: str) -> Iterator[Point]:
    if stage == "pool":
        for training in (*plan.pool_plan.bases, *plan.pool_plan.finetunings):
            for member in training.members:
                manifest = storage.open("member", member.fingerprint).manifest
                yield Point("validation_accuracy", training.name, member.epoch, manifest["validation_accuracy"])
            for epoch, loss in enumerate(manifest.get("losses", []), start=1):
                yield Point("loss", training.name, epoch, loss)
    elif stage == "synthesis":
        for unit in plan.units():
            for step, *losses in storage.open("unit", unit.fingerprint).manifest["losses"]:
                for curve, loss in zip(("statistics", "cross_entropy", "priors"), losses, strict=True):
                    yield Point(curve, unit.name, step, loss)
    elif stage == "evaluation":
        for run in plan.students:
            manifest = storage.open("student", run.fingerprint).manifest
            yield Point("accuracy", run.name, manifest["steps"], manifest["accuracy"])


def _file_name(text: str) -> str:
    """A name that any file system takes."""
    return "".join(char if char.isalnum() or char in "-_.=," else "_" for char in text)
