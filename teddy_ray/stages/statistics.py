"""Stage 2, on Ray Data: one pass over the data gives the per-class moments of every member at every tapped layer.

The data is cut into chunks, stretches of rows in its own order. An actor takes a chunk's moments, which are published
as an artifact of their own. When all are there, tasks merge them, class range by class range, in the order of the data.
So no number of workers and no loss of one changes a byte, and nothing large passes through the driver. Chunks are
deleted in the end; those that an interrupted deletion leaves are no one's, and are used again if they are whole.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayError, RayTaskError, UserCodeException
from torch import Tensor

from teddy_ray.augment import apply_boxes, boxes_of_each
from teddy_ray.device import environment, is_out_of_memory, keep_freed_memory, prepare
from teddy_ray.engine import Machine, check_machine, choose_kernels
from teddy_ray.errors import InputError, StageError
from teddy_ray.fingerprints import fingerprint
from teddy_ray.members import load_members
from teddy_ray.moments import Moments
from teddy_ray.pixels import from_pixels
from teddy_ray.plan import MERGE_TASKS, Plan, blocks
from teddy_ray.recipe import Recipe
from teddy_ray.recipe import Statistics as StatisticsPart
from teddy_ray.sources import Source
from teddy_ray.sources.loader import Loader
from teddy_ray.stages.board import Poster
from teddy_ray.stages.dispatch import own_error
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.machine import machine_of
from teddy_ray.stages.quiet import RESTARTABLE_ACTOR, without_lines
from teddy_ray.stages.session import Session
from teddy_ray.statistics import Measurer
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import POOLED, merge_chunks, pool_classes, to_tensors, write_chunk

NO_PROGRESS_TIMEOUT_S = 6 * 3600
"""After so long without a chunk Ray Data gives up: more than any chunk takes, less than for ever."""

POLL_S = 0.5


@dataclass(frozen=True)
class Chunk:
    """A stretch of rows of the training data, in its own order.

    The fingerprint covers the environment of the workers too: moments of a chunk that were taken elsewhere, before a
    run was resumed, differ in their low bits.
    """

    rows: range
    fingerprint: str

    @property
    def name(self) -> str:
        return f"rows {self.rows[0]}-{self.rows[-1]}"


def run(session: Session) -> None:
    """Take the moments of the chunks that are not there yet, merge them, publish.

    Where the BatchNorms' buffers are used there is nothing to do: they lie in the members.
    """
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.statistics
    if part.source == "buffers":
        with storage.publish("statistics", plan.statistics) as draft:
            draft.facts = {"num_images": 0, "seconds": time.monotonic() - started, "worker_seconds": 0.0}
        return
    session.start()
    try:
        _measure(session, started)
    except InputError:
        # another run that shares the storage may have published the same, and deleted the chunks
        if not storage.has("statistics", plan.statistics):
            raise


def _measure(session: Session, started: float) -> None:
    plan, storage, part = session.plan, session.storage, session.recipe.statistics
    machine = machine_of(part, "statistics")
    kernels = choose_kernels("statistics.kernels", part.kernels, "fp32", machine)
    chunks = _chunks(plan, kernels)
    images_per_s = _take(session, chunks, machine, kernels)
    pooled = _merge_all(plan, storage, chunks)
    with ThreadPoolExecutor(16) as threads:  # a remote manifest takes many milliseconds
        manifests = [
            artifact.manifest for artifact in threads.map(lambda c: storage.open("chunk", c.fingerprint), chunks)
        ]
    with storage.publish("statistics", plan.statistics) as draft:
        draft.write_tensors(POOLED, to_tensors(pooled))
        draft.facts = {
            "layout": manifests[0]["layout"],
            "num_images": sum(len(chunk.rows) for chunk in chunks),
            "num_decoded": sum(manifest["num_decoded"] for manifest in manifests),
            "images_per_s": images_per_s,
            "device": manifests[0]["device"],
            "seconds": time.monotonic() - started,
            "worker_seconds": sum(manifest["seconds"] for manifest in manifests),
        }
    for chunk in chunks:
        storage.discard("chunk", chunk.fingerprint)


def _chunks(plan: Plan, kernels: bool) -> list[Chunk]:
    part = plan.recipe.statistics
    remote = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker)
    there = result_of(remote(_environment).remote(part, kernels), "statistics", "a worker")
    return [
        Chunk(
            rows,
            fingerprint("statistics", statistics=plan.statistics, rows=[rows.start, rows.stop], environment=there),
        )
        for rows in plan.chunks()
    ]


def _environment(part: StatisticsPart, kernels: bool) -> dict[str, Any]:
    return environment(prepare(part.threads, part.gpus_per_worker), kernels=kernels)


# -- chunks ------------------------------------------------------------------------------------------------------------


def _take(session: Session, chunks: Sequence[Chunk], machine: Machine, kernels: bool) -> float:
    """Publish the chunks that are not there yet. Returns images per second of all workers, their start-up left out."""
    plan, storage, part = session.plan, session.storage, session.recipe.statistics
    published = storage.published("chunk")
    missing = {chunk.fingerprint: chunk for chunk in chunks if chunk.fingerprint not in published}
    if not missing:
        return 0.0
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    items = [
        {"fingerprint": chunk.fingerprint, "start": chunk.rows.start, "stop": chunk.rows.stop}
        for chunk in missing.values()
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        batch_size=1,
        fn_constructor_kwargs={
            "plan": plan,
            "storage": storage,
            "source": session.source_ref,
            "machine": machine,
            "kernels": kernels,
            "poster": session.board.poster(),
        },
        # one in hand and one that waits: none idles between two, and few are left to one worker in the end
        compute=ray.data.ActorPoolStrategy(
            size=session.workers(part, at_most=len(missing)), max_tasks_in_flight_per_actor=2
        ),
        # half a CPU per thread: a pool that takes every CPU hangs (ray issue 44687)
        num_cpus=0.5 * part.threads,
        num_gpus=part.gpus_per_worker,
    )
    began, ended, num_images, num_done = [], [], 0, 0
    running = {chunk.fingerprint: chunk.name for chunk in missing.values()}
    with session.progress.stage("statistics", len(missing), "chunks") as bar:
        show = session.board.shown_on(bar)
        with _ticking(lambda: show(num_done, list(running.values()))):
            for row in _rows(dataset):
                began.append(row["began"])
                ended.append(row["ended"])
                num_images += row["num_images"]
                num_done += 1
                del running[row["fingerprint"]]
    return float(num_images / (max(ended) - min(began)))


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Calls it now and then while the block runs: Ray Data says nothing between two rows."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(POLL_S):
            with contextlib.suppress(RayError):  # what a person sees is not worth the run
                tick()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    try:
        with without_lines(RESTARTABLE_ACTOR):
            for row in dataset.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])  # noqa: S301  # from our own worker
                yield row
    except (RayTaskError, UserCodeException) as error:
        raise own_error(error, "statistics", "a chunk of the data") from None


class _Worker:
    """Holds the members on its device; takes the moments of one chunk at a time and publishes them.

    Keeps nothing of a chunk: one that is done again counts once.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        source: ray.ObjectRef[Source],
        machine: Machine,
        kernels: bool,
        poster: Poster,
    ) -> None:
        part, self._plan, self._storage, self._poster = plan.recipe.statistics, plan, storage, poster
        self._device, self._machine, self._kernels = prepare(part.threads, part.gpus_per_worker), machine, kernels
        self._source = source
        keep_freed_memory()

    @cached_property
    def _measurer(self) -> Measurer:
        # made by the first chunk: Ray hides the cause of an error in a constructor
        check_machine(self._device, self._machine, self._plan.recipe.cluster.address)
        models = load_members(self._plan, self._storage, self._plan.members)
        return Measurer(models, self._device, kernels=self._kernels)

    @cached_property
    def _loader(self) -> Loader:
        return Loader(ray.get(self._source).train, max_bytes=0, num_threads=self._plan.recipe.statistics.decoders)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(range(int(batch["start"][0]), int(batch["stop"][0])), str(batch["fingerprint"][0]))
        began, error = time.time(), b""
        try:
            self._measurer, self._loader  # noqa: B018  # loaded before the clock starts
            began = time.time()
            if not self._storage.has("chunk", chunk.fingerprint):  # by a worker that was given up too early
                self._publish(chunk)
        except (InputError, StageError) as own:
            error = pickle.dumps(own)  # in a row, for Ray Data loses the cause of what it wraps on the way
        row = {
            "fingerprint": chunk.fingerprint,
            "num_images": len(chunk.rows),
            "began": began,
            "ended": time.time(),
            "error": error,
        }
        return {name: np.array([value], dtype=object) for name, value in row.items()}

    def _publish(self, chunk: Chunk) -> None:
        started, decoded = time.monotonic(), self._loader.num_decoded
        labels = self._loader.images.labels[chunk.rows.start : chunk.rows.stop]
        classes, rows = (torch.from_numpy(values) for values in np.unique(labels, return_inverse=True))
        try:
            moments, layout = self._measurer.measure(self._batches(chunk, rows.to(self._device)), len(classes))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                remedy = "out of memory; lower statistics.batch_size, or run fewer workers per node"
                raise StageError("statistics", chunk.name, remedy) from error
            raise
        if len(bad := torch.nonzero(~(moments.mean + moments.m2).isfinite().all(0))):
            member, layer = layout.owner(int(bad[0]))
            item = f"{chunk.name}, member {self._plan.members[member].name}, layer {layer}"
            raise StageError("statistics", item, "its activations are not finite; look at that member's training")
        with self._storage.publish("chunk", chunk.fingerprint) as draft:
            write_chunk(draft, self._plan.class_ranges(), classes, moments)
            draft.facts = {
                "name": chunk.name,
                "layout": layout.members,
                "num_decoded": self._loader.num_decoded - decoded,
                "device": environment(self._device, kernels=self._kernels)["device"],
                "pid": os.getpid(),
                "seconds": time.monotonic() - started,
            }

    def _batches(self, chunk: Chunk, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device, as the members are to see them. labels: of the chunk's rows."""
        started, done = time.monotonic(), 0
        batches = [np.array(rows) for rows in blocks(chunk.rows, self._plan.recipe.statistics.batch_size)]
        for rows, pixels in zip(batches, self._loader.ahead(batches), strict=True):
            ids = [self._loader.images.ids[row] for row in rows]
            yield views_of(self._plan.recipe, ids, from_pixels(pixels, self._device)), labels[done : done + len(rows)]
            done += len(rows)
            self._poster(chunk.name, done / len(chunk.rows), images_per_s=done / (time.monotonic() - started))


def views_of(recipe: Recipe, ids: Sequence[str], images: Tensor) -> Tensor:
    """What is measured of images (n c h w): themselves, or the one view of each that its id draws."""
    if recipe.statistics.view == "plain":
        return images
    keys = (("statistics", recipe.seed, image_id) for image_id in ids)
    return apply_boxes(images, boxes_of_each(recipe.synthesis.augmentation, keys))


# -- merging -----------------------------------------------------------------------------------------------------------


def _merge_all(plan: Plan, storage: Storage, chunks: Sequence[Chunk]) -> Moments:
    """Publish the moments of the class ranges that are not there yet, on any workers. Returns those of all data."""
    published, ranges = storage.published("moments"), plan.class_ranges()
    missing = [part for part in ranges if part.fingerprint not in published]
    if missing:  # some of them may be of an earlier try, on other machines
        for part in ranges:
            storage.discard("moments", part.fingerprint)
        missing = list(ranges)
    size = -(-len(missing) // MERGE_TASKS) or 1
    shares = [missing[first : first + size] for first in range(0, len(missing), size)]
    in_order = [chunk.fingerprint for chunk in chunks]
    for task in [ray.remote(merge_chunks).remote(storage, in_order, share) for share in shares]:
        result_of(task, "statistics", "merging chunks")
    pooled: Moments = result_of(ray.remote(pool_classes).remote(storage, ranges), "statistics", "merging classes")
    return pooled
