"""Stage 3, on Ray actors: optimise the units of S by Eq. 7, those of disjoint classes at the same time."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from teddy_ray.device import describe, prepare, versions
from teddy_ray.plan import ImageSet, Plan, Unit
from teddy_ray.randomness import generator
from teddy_ray.sources import Images, Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.dispatch import Dispatcher
from teddy_ray.stages.executor import RayExecutor
from teddy_ray.stages.pool import load_members
from teddy_ray.stages.session import Session
from teddy_ray.stages.statistics import load_moments
from teddy_ray.storage import Storage
from teddy_ray.synthesis import Member, noise_start, optimise_unit

CURVE_POINTS = 50
"""Points of a unit's loss curve that its manifest keeps."""


def run(session: Session) -> None:
    """Optimise the units that are not there yet, then publish the list of all."""
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.synthesis
    num_missing = sum(not storage.has("unit", unit.fingerprint) for unit in plan.units())
    if num_missing:
        session.start()
        settings = (plan, storage, session.source_ref, session.board.poster())
        actor = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker)(Synthesiser)
        dispatcher = Dispatcher[Unit](
            "synthesis",
            RayExecutor(lambda: actor.remote(*settings), lambda worker, unit: worker.optimise.remote(unit)),
            num_workers=session.workers(part, at_most=num_missing),
            exclusive=lambda unit: unit.classes[0],
            memory_remedy="lower synthesis.slots_per_unit or synthesis.classes_per_unit, or run fewer workers per node",
        )
        with session.progress.stage("synthesis", num_missing, "units") as bar:
            missing = (unit for unit in plan.units() if not storage.has("unit", unit.fingerprint))
            for _ in dispatcher.run(missing, session.board.shown_on(bar)):
                pass
    manifests = {unit: storage.open("unit", unit.fingerprint).manifest for unit in plan.units()}
    worker_seconds = sum(manifest["seconds"] for manifest in manifests.values())
    with storage.publish("synthesis", plan.synthesis) as draft:
        draft.facts = {
            "units": [
                {
                    "name": unit.name,
                    "classes": list(unit.classes),
                    "slots": list(unit.slots),
                    "fingerprint": unit.fingerprint,
                }
                for unit in manifests
            ],
            "images": plan.num_images,
            "images_steps_per_s": plan.num_images * part.steps / worker_seconds,
            "device": ", ".join(sorted({manifest["device"] for manifest in manifests.values()})),
            "versions": versions(),
            "seconds": time.monotonic() - started,
            "worker_seconds": worker_seconds,
        }


def read_set(plan: Plan, source: Source, storage: Storage, images: ImageSet, rows: range) -> npt.NDArray[np.uint8]:
    """The 8-bit images of some rows of a set, (n c h w). Rows are ordered by class, then slot."""
    per_class = plan.recipe.synthesis.images_per_class
    classes = range(rows[0] // per_class, rows[-1] // per_class + 1)
    offset = classes.start * per_class
    if images.draw is not None:
        draws = [draw_real(source.train, label, per_class, "random", images.draw) for label in classes]
        return source.train.read(np.concatenate(draws)[rows.start - offset : rows.stop - offset])
    size = plan.recipe.data.image_size
    pixels = np.empty((len(plan.data.classes), per_class, plan.recipe.data.channels, size, size), dtype=np.uint8)
    for unit in plan.units():
        if unit.classes.start >= classes.stop or unit.classes.stop <= classes.start:
            continue
        block = storage.open("unit", unit.fingerprint).tensors("images.safetensors")["images"].numpy()
        shape = (len(unit.classes), len(unit.slots), *block.shape[1:])
        pixels[unit.classes.start : unit.classes.stop, unit.slots.start : unit.slots.stop] = block.reshape(shape)
    return pixels.reshape(-1, *pixels.shape[2:])[rows.start : rows.stop]


def draw_real(images: Images, label: int, num: int, *key: str | int) -> npt.NDArray[np.intp]:
    """Positions of `num` random images of a class; a longer draw starts with the shorter one."""
    return generator(*key, images.classes[label]).permutation(images.of_class(label))[:num]


class Synthesiser:
    """Holds the members and their moments on its device; optimises one unit at a time and publishes it."""

    def __init__(self, plan: Plan, storage: Storage, source: Source, poster: Poster) -> None:
        part = plan.recipe.synthesis
        self._plan, self._storage, self._train, self._poster = plan, storage, source.train, poster
        self._device = prepare(part.threads, part.gpus_per_worker)

    @cached_property
    def _members(self) -> list[Member]:
        # loaded by the first unit: Ray hides the cause of an error in a constructor
        plan, storage = self._plan, self._storage
        statistics = storage.open("statistics", plan.statistics)
        models = load_members(plan, storage, plan.members)
        return [
            Member(member.name, model.to(self._device), load_moments(statistics, index))
            for index, (member, model) in enumerate(zip(plan.members, models, strict=True))
        ]

    def optimise(self, unit: Unit) -> None:
        started = time.monotonic()
        recipe = self._plan.recipe
        labels = np.repeat(np.array(unit.classes, dtype=np.int64), len(unit.slots))

        def report(step: int, loss: float) -> None:
            steps = recipe.synthesis.steps
            self._poster(unit.name, step / steps, f"step {step}/{steps}, loss {loss:.3f}")

        result = optimise_unit(
            self._start(unit), labels, self._members, recipe, key=unit.name, device=self._device, on_progress=report
        )
        with self._storage.publish("unit", unit.fingerprint) as draft:
            draft.write_tensors("images.safetensors", {"images": torch.from_numpy(result.images)})
            draft.facts = {
                "name": unit.name,
                "losses": _thin(result.losses),
                "device": describe(self._device),
                "seconds": time.monotonic() - started,
            }

    def _start(self, unit: Unit) -> npt.NDArray[np.uint8]:
        recipe = self._plan.recipe
        if recipe.synthesis.start == "noise":
            key: tuple[Any, ...] = (recipe.seed, unit.name)
            return noise_start(unit.num_images, recipe.data.channels, recipe.data.image_size, key)
        rows = [
            draw_real(self._train, label, unit.slots[-1] + 1, "start", recipe.seed)[unit.slots[0] :]
            for label in unit.classes
        ]
        return self._train.read(np.concatenate(rows))


def _thin(losses: npt.NDArray[np.float32]) -> list[list[float]]:
    """At most CURVE_POINTS of (step, statistics, u CE), each the mean of the steps up to it."""
    blocks = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)))
    return [[int(block[-1]) + 1, *(float(mean) for mean in losses[block].mean(0))] for block in blocks]
