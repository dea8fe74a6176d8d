"""Stage 3, on Ray actors: optimise the units of S by Eq. 7, those of disjoint classes at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import nn

from teddy_ray.checkpoints import Checkpoint, saved_digest
from teddy_ray.device import environment, keep_freed_memory, prepare, versions
from teddy_ray.engine import Engine, Machine, check_machine, choose
from teddy_ray.matching import Target
from teddy_ray.members import load_members
from teddy_ray.moments import buffer_moments
from teddy_ray.pixels import to_pixels
from teddy_ray.plan import Plan, Unit
from teddy_ray.sources import Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.crew import work_off
from teddy_ray.stages.images import FINISHED, START, make_start
from teddy_ray.stages.machine import machine_of, node_id
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import MomentsReader
from teddy_ray.synthesis import Member, State, optimise

MANIFESTS_AT_ONCE = 1000
CURVE_POINTS = 50
"""Points of a unit's loss curve that its manifest keeps."""


def run(session: Session) -> None:
    """Optimise the units that are not there yet, then publish the list of all."""
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.synthesis
    units = {unit.fingerprint: unit for unit in plan.units()}
    for missing in session.claims.turns("unit", lambda: storage.missing("unit", units)):
        session.start()
        machine = machine_of(part, "synthesis")
        largest = max(units.values(), key=lambda unit: unit.num_images)
        engine = choose(plan.recipe, len(plan.data.classes), largest.num_images, machine)
        session.progress.say(f"synthesis  {engine}")
        work_off(
            session,
            "synthesis",
            part,
            [units[fingerprint] for fingerprint in missing],
            at_once=-(-len(plan.data.classes) // part.classes_per_unit),
            worker=Synthesiser,
            settings=(plan, storage, session.source_ref, machine, session.board.poster("synthesis")),
            call=lambda worker, unit: worker.optimise.remote(unit),
            exclusive=lambda unit: unit.classes[0],
            mark=lambda unit: saved_digest(storage, "unit", unit.fingerprint),
            memory_remedy="lower synthesis.slots_per_unit or synthesis.classes_per_unit, or run fewer workers per node",
            title="synthesis",
            what="units",
        )
    worker_seconds, devices = _facts(plan, storage)
    with storage.publish("synthesis", plan.synthesis) as draft:
        draft.facts = {
            "images": plan.num_images,
            "images_steps_per_s": plan.num_images * part.steps / worker_seconds,
            "device": ", ".join(sorted(devices)),
            "versions": versions(),
            "seconds": time.monotonic() - started,
            "worker_seconds": worker_seconds,
        }


def _facts(plan: Plan, storage: Storage) -> tuple[float, set[str]]:
    """What the manifests of all units say: seconds of work, devices."""
    seconds, devices = 0.0, set()
    units = plan.units()
    with ThreadPoolExecutor(16) as threads:  # a remote manifest takes many milliseconds
        while some := list(islice(units, MANIFESTS_AT_ONCE)):
            for artifact in threads.map(lambda unit: storage.open("unit", unit.fingerprint), some):
                seconds += artifact.manifest["seconds"]
                devices.add(artifact.manifest["device"])
    return seconds, devices


class Synthesiser:
    """Holds the members and their moments on its device; optimises one unit at a time and publishes it."""

    def __init__(self, plan: Plan, storage: Storage, source: Source, machine: Machine, poster: Poster) -> None:
        part = plan.recipe.synthesis
        self._plan, self._storage, self._train, self._poster = plan, storage, source.train, poster
        self._device, self._machine = prepare(part.threads, part.gpus_per_worker), machine
        keep_freed_memory()

    @cached_property
    def _models(self) -> list[nn.Module]:
        # loaded by the first unit: Ray hides the cause of an error in a constructor
        plan = self._plan
        return [model.to(self._device) for model in load_members(plan, self._storage, plan.members)]

    @cached_property
    def _members(self) -> list[Member]:
        plan = self._plan
        engine = self._engine(plan.num_images)  # number format and kernels are the same whatever the unit
        return [
            Member(member.name, model, engine.dtype, kernels=engine.kernels)
            for member, model in zip(plan.members, self._models, strict=True)
        ]

    @cached_property
    def _moments(self) -> MomentsReader:
        return MomentsReader(self._plan, self._storage)

    def _targets(self, unit: Unit) -> list[list[Target]]:
        """Of each member, from the moments of the unit's classes alone."""
        recipe = self._plan.recipe
        rows = torch.arange(len(unit.classes), device=self._device).repeat_interleave(len(unit.slots))
        buffers = recipe.statistics.source == "buffers"
        pooled = [buffer_moments(model) for model in self._models] if buffers else self._moments.pooled
        known = pooled if recipe.statistics.scope == "global" else self._moments.of(unit.classes)
        members = zip(self._members, known, pooled, strict=True)
        return [member.targets(own, of_all, rows, recipe) for member, own, of_all in members]

    def optimise(self, unit: Unit) -> None:
        started = time.monotonic()
        check_machine(self._device, self._machine, self._plan.recipe.cluster.address)
        recipe, engine = self._plan.recipe, self._engine(unit.num_images)
        here = {**environment(self._device, kernels=engine.kernels), "engine": str(engine)}
        checkpoint = Checkpoint(self._storage, "unit", unit.fingerprint, here)
        if self._storage.has("unit", unit.fingerprint):  # by a worker that was given up too early
            return checkpoint.drop()
        start = make_start(self._plan, self._train, unit, self._models, self._device)
        if (saved := checkpoint.load()) is not None:
            started -= float(saved.pop("seconds"))
            begin = State.from_tensors(saved, self._device)
        else:
            begin = State.begin(start, recipe, self._device)
        self._poster.begin(unit.name, begin.step / recipe.synthesis.steps)
        labels = np.repeat(np.array(unit.classes, dtype=np.int64), len(unit.slots))
        last, looked = begin.step, time.monotonic()
        checkpointed = looked
        states = optimise(begin, labels, self._members, self._targets(unit), recipe, key=unit.name, loss=engine.loss)
        for state in states:
            now = time.monotonic()
            statistics, ce, _ = state.mean_losses(state.step - last)
            self._poster(
                unit.name,
                state.step / recipe.synthesis.steps,
                images_steps_per_s=unit.num_images * (state.step - last) / (now - looked),
                statistics=statistics,
                cross_entropy=ce,
            )
            looked, last = now, state.step
            if now - checkpointed >= recipe.synthesis.checkpoint_s and state.step < recipe.synthesis.steps:
                checkpoint.save({**state.tensors(), "seconds": torch.tensor(now - started)})
                checkpointed = time.monotonic()
        with self._storage.publish("unit", unit.fingerprint) as draft:
            draft.write_tensors(FINISHED, {"images": to_pixels(state.images)})
            draft.write_tensors(START, {"images": torch.from_numpy(start)})
            draft.facts = {
                "name": unit.name,
                "losses": _thin(state.losses.mean(1).cpu().numpy()),
                "device": here["device"],
                "engine": here["engine"],
                "resumed_at": begin.step,
                "worker": ray.get_runtime_context().get_actor_id(),
                "node": node_id(),
                "seconds": time.monotonic() - started,
            }
        self._poster.done(unit.name, draft.facts["seconds"])
        checkpoint.drop()

    def _engine(self, num_images: int) -> Engine:
        return choose(self._plan.recipe, len(self._plan.data.classes), num_images, self._machine)


def _thin(losses: npt.NDArray[np.float32]) -> list[list[float]]:
    """At most CURVE_POINTS of (step, statistics, u CE, priors), each the mean of the steps up to it."""
    blocks = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)))
    return [[int(block[-1]) + 1, *(float(mean) for mean in losses[block].mean(0))] for block in blocks]
