"""Stage 2, on Ray Data: one pass over the data gives the per-class moments of every member at every tapped layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError, UserCodeException
from safetensors.torch import load, save
from torch import Tensor, nn

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.device import prepare
from teddy_ray.members import load_members
from teddy_ray.moments import Moments, class_moments
from teddy_ray.pixels import from_pixels
from teddy_ray.plan import Plan
from teddy_ray.randomness import generator
from teddy_ray.recipe import Recipe
from teddy_ray.sources import Source
from teddy_ray.stages.dispatch import own_error
from teddy_ray.stages.quiet import RESTARTABLE_ACTOR, without_lines
from teddy_ray.stages.session import Session
from teddy_ray.storage import Artifact, Storage
from teddy_ray.taps import Taps

FIELDS = ("count", "mean", "m2")
NO_PROGRESS_TIMEOUT_S = 600


def run(session: Session) -> None:
    """Cut the data into chunks by its own order, take each chunk's moments on an actor, merge in order.

    Where the BatchNorms' buffers are used there is nothing to do: they lie in the members.
    """
    started = time.monotonic()
    if session.recipe.statistics.source == "buffers":
        with session.storage.publish("statistics", session.plan.statistics) as draft:
            draft.facts = {"num_images": 0, "seconds": time.monotonic() - started, "worker_seconds": 0.0}
        return
    session.start()
    plan, part = session.plan, session.recipe.statistics
    num_chunks = -(-len(session.source.train) // part.chunk_size)
    pool_size = session.workers(part, at_most=num_chunks)

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # merges in the data's order, whoever is first
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    # Actors take half a CPU per thread, so that the tasks that decode images always find room: a pool that takes
    # every CPU hangs (ray issue 44687). Unequal shares also keep Ray Data from fusing the two steps into one.
    partial_moments = (
        ray.data.range(num_chunks, override_num_blocks=num_chunks)
        .map_batches(
            _read_chunk,  # type: ignore[arg-type]  # Ray's stubs know no fn_kwargs
            batch_size=1,
            fn_kwargs={"source": session.source_ref, "recipe": session.recipe},
            num_cpus=0.25,
        )
        .map_batches(
            _TakeMoments,
            batch_size=1,
            fn_constructor_kwargs={"plan": plan, "storage": session.storage},
            compute=ray.data.ActorPoolStrategy(size=pool_size),
            num_cpus=0.5 * part.threads,
            num_gpus=part.gpus_per_worker,
        )
    )

    total: dict[str, Moments] = {}
    worker_seconds = 0.0
    with session.progress.stage("statistics", num_chunks, "chunks") as bar:
        for done, row in enumerate(_rows(partial_moments), start=1):
            worker_seconds += float(row["seconds"])
            for name, moments in _unpack(load(row["moments"])).items():
                total[name] = total[name].merge(moments) if name in total else moments
            bar.update(done)
    with session.storage.publish("statistics", plan.statistics) as draft:
        for index in range(len(plan.members)):
            prefix = f"{index}/"
            layers = {name.removeprefix(prefix): total[name] for name in total if name.startswith(prefix)}
            draft.write_tensors(_file(index), _pack(layers))
        draft.facts = {
            "num_images": len(session.source.train),
            "seconds": time.monotonic() - started,
            "worker_seconds": worker_seconds,
        }


def load_moments(artifact: Artifact, index: int) -> dict[str, Moments]:
    """The moments of the pool's index-th member, by tapped layer."""
    return _unpack(artifact.tensors(_file(index)))


def _file(index: int) -> str:
    return f"member-{index:04d}.safetensors"


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    try:
        with without_lines(RESTARTABLE_ACTOR):
            yield from dataset.iter_rows()
    except (RayTaskError, UserCodeException) as error:
        raise own_error(error, "statistics", "a chunk of the data") from None


def _read_chunk(batch: dict[str, Any], source: ray.ObjectRef[Source], recipe: Recipe) -> dict[str, Any]:
    """Decode the images of one chunk, each once for all members, and draw the boxes of their views."""
    train = ray.get(source).train
    size, chunk = recipe.statistics.chunk_size, int(batch["id"][0])
    index = np.arange(chunk * size, min((chunk + 1) * size, len(train)))
    random = [generator("statistics", recipe.seed, train.ids[int(row)]) for row in index]
    boxes = np.concatenate([draw_boxes(recipe.synthesis.augmentation, one, 1) for one in random])
    return {"images": train.read(index)[None], "labels": train.labels[index][None], "boxes": boxes[None]}


class _TakeMoments:
    """Holds the members on its device; chunk in, packed partial moments out. Keeps nothing between chunks."""

    def __init__(self, plan: Plan, storage: Storage) -> None:
        part, self._plan, self._storage = plan.recipe.statistics, plan, storage
        self._augmented, self._num_classes = part.view == "augmented", len(plan.data.classes)
        self._device = prepare(part.threads, part.gpus_per_worker)

    @cached_property
    def _models(self) -> list[nn.Module]:
        # loaded by the first chunk: Ray hides the cause of an error in a constructor
        return [model.to(self._device) for model in load_members(self._plan, self._storage, self._plan.members)]

    @torch.inference_mode()
    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        started = time.monotonic()
        x = from_pixels(batch["images"][0], self._device)
        y = torch.from_numpy(batch["labels"][0].copy()).to(self._device)
        if self._augmented:
            x = apply_boxes(x, batch["boxes"][0])
        moments = {}
        for index, model in enumerate(self._models):
            with Taps(model) as taps:
                model(x)
                for layer, activation in zip(taps.layers, taps.take(), strict=True):
                    moments[f"{index}/{layer}"] = class_moments(activation, y, self._num_classes)
        return {
            "moments": np.array([save(_pack(moments))], dtype=object),
            "seconds": np.array([time.monotonic() - started]),
        }


def _pack(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    return {f"{name}/{field}": getattr(m, field).cpu() for name, m in moments.items() for field in FIELDS}


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Moments]:
    names = dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors)
    return {name: Moments(**{field: tensors[f"{name}/{field}"] for field in FIELDS}) for name in names}
