"""What a stage measured, as TensorBoard reads it: runs/<name>/tensorboard/<stage>/, where the recipe asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tensorboardX import SummaryWriter

from teddy_ray.plan import Plan
from teddy_ray.storage import Storage

TENSORBOARD = "tensorboard"


class Point(NamedTuple):
    """A scalar of a curve. of: what it belongs to, such as a unit."""

    curve: str
    of: str
    step: int
    value: float


def write_events(plan: Plan, storage: Storage, stage: str) -> None:
    """Write the file of a finished stage, in place of an earlier one."""
    points = list(_points(plan, storage, stage))
    if not points:
        return
    with tempfile.TemporaryDirectory() as folder:
        writers: dict[str, SummaryWriter] = {}
        for point in points:
            if point.of not in writers:
                writers[point.of] = SummaryWriter(str(Path(folder, _file_name(point.of))))
            writers[point.of].add_scalar(f"{stage}/{point.curve}", point.value, point.step)
        target = f"runs/{plan.recipe.name}/{TENSORBOARD}/{stage}"
        storage.delete_folder(target)
        for writer in writers.values():
            writer.close()
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                storage.write(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


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
