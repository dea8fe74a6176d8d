"""Stage 2, on Ray Data: one pass over the data gives the per-class moments of every member at every tapped layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load, save

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.device import prepare
from teddy_ray.moments import Moments, class_moments
from teddy_ray.plan import Member, Plan
from teddy_ray.randomness import generator
from teddy_ray.sources import Source
from teddy_ray.stages.pool import load_members
from teddy_ray.stages.session import Session
from teddy_ray.storage import Artifact, Storage
from teddy_ray.synthesis import from_pixels
from teddy_ray.taps import Taps

FIELDS = ("count", "mean", "m2")
NO_PROGRESS_TIMEOUT_S = 600


def run(session: Session) -> None:
    """Cut the data into chunks by its own order, take each chunk's moments on an actor, merge in order."""
    started = time.monotonic()
    session.start()
    plan, part = session.plan, session.recipe.statistics
    num_chunks = -(-len(session.source.train) // part.chunk_size)
    pool_size = session.workers(part, at_most=num_chunks)

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # merges in the data's order, whoever is first
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    # Actors take half a CPU per thread, so that the tasks that decode images always find one.
    partial_moments = (
        ray.data.range(num_chunks, override_num_blocks=num_chunks)
        .map_batches(
            _read_chunk,
            batch_size=1,
            fn_kwargs={"source": session.source_ref, "chunk_size": part.chunk_size},
            num_cpus=0.5,
        )
        .map_batches(
            _TakeMoments,
            batch_size=1,
            fn_constructor_kwargs={"plan": plan, "storage": session.storage, "source": session.source_ref},
            compute=ray.data.ActorPoolStrategy(size=pool_size),
            num_cpus=0.5 * part.threads,
            num_gpus=part.gpus_per_worker,
        )
    )

    total: dict[str, Moments] = {}
    with session.progress.stage("statistics", num_chunks, "chunks") as bar:
        worker_seconds = 0.0
        for done, row in enumerate(_rows(partial_moments), start=1):
            worker_seconds += float(row["seconds"])
            for name, moments in _unpack(row["moments"]).items():
                total[name] = total[name].merge(moments) if name in total else moments
            bar.update(done)
    with session.storage.publish("statistics", plan.statistics) as draft:
        for index, member in enumerate(plan.members):
            layers = {name: moments for name, moments in total.items() if name.startswith(f"{index}/")}
            tensors = {f"{name.split('/', 1)[1]}/{key}": getattr(m, key) for name, m in layers.items() for key in FIELDS}
            draft.write_tensors(_file(index), tensors)
            draft.facts.setdefault("layers", {})[member.name] = [name.split("/", 1)[1] for name in layers]
        draft.facts |= {
            "num_images": len(session.source.train),
            "seconds": time.monotonic() - started,
            "worker_seconds": worker_seconds,
        }


def load_moments(artifact: Artifact, index: int, member: Member) -> list[Moments]:
    """The moments of the pool's index-th member, per tapped layer in the model's order."""
    tensors = artifact.tensors(_file(index))
    return [
        Moments(**{key: tensors[f"{layer}/{key}"] for key in FIELDS}) for layer in artifact.manifest["layers"][member.name]
    ]


def _file(index: int) -> str:
    return f"member-{index:04d}.safetensors"


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.iter_rows()
    except RayTaskError as error:
        raise error.cause or error from None


def _read_chunk(batch: dict[str, npt.NDArray[Any]], source: Any, chunk_size: int) -> dict[str, Any]:
    """Decode the images of one chunk, each once for all members."""
    images = ray.get(source).train
    chunk = int(batch["id"][0])
    index = np.arange(chunk * chunk_size, min((chunk + 1) * chunk_size, len(images)))
    return {"chunk": np.array([chunk]), "images": images.read(index)[None]}


class _TakeMoments:
    """Holds the members on its device; chunk in, packed partial moments out. Keeps nothing between chunks."""

    def __init__(self, plan: Plan, storage: Storage, source: Any) -> None:
        part = plan.recipe.statistics
        self._recipe, self._num_classes = plan.recipe, len(plan.data.classes)
        self._device = prepare(part.threads, part.gpus_per_worker)
        self._models = [model.to(self._device) for model in load_members(plan, storage, plan.members)]
        images = ray.get(source).train
        self._ids: Sequence[str] = images.ids
        self._labels: npt.NDArray[np.int64] = images.labels

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        started = time.monotonic()
        part = self._recipe.statistics
        first = int(batch["chunk"][0]) * part.chunk_size
        x = from_pixels(batch["images"][0], self._device)
        y = torch.from_numpy(self._labels[first : first + len(x)]).to(self._device)
        if part.view == "augmented":
            augmentation, seed = self._recipe.synthesis.augmentation, self._recipe.seed
            draws = [
                draw_boxes(augmentation, generator("statistics", seed, image_id), 1)
                for image_id in self._ids[first : first + len(x)]
            ]
            x = apply_boxes(x, np.concatenate(draws))
        packed = {}
        with torch.inference_mode():
            for index, model in enumerate(self._models):
                with Taps(model) as taps:
                    model(x)
                    for layer, activation in zip(taps.layers, taps.take(), strict=True):
                        moments = class_moments(activation, y, self._num_classes)
                        packed |= {f"{index}/{layer}/{key}": getattr(moments, key).cpu() for key in FIELDS}
        return {
            "moments": np.array([save(packed)], dtype=object),
            "seconds": np.array([time.monotonic() - started]),
        }


def _unpack(data: bytes) -> dict[str, Moments]:
    """Partial moments by "<member>/<layer>"."""
    tensors = load(data)
    names = dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors)
    return {name: Moments(**{key: tensors[f"{name}/{key}"] for key in FIELDS}) for name in names}
