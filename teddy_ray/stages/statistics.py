"""Stage 2, on Ray Data: one pass over the data gives the per-class moments of every member at every tapped layer.

The data is cut into chunks, stretches of rows in its own order. An actor takes a chunk's moments, which are published
as an artifact of their own. When all are there, tasks merge them, class range by class range, in the order of the data.
So no number of workers and no loss of one changes a byte, and nothing large passes through the driver. Chunks are
deleted in the end; those that an interrupted deletion leaves are no one's, and are used again if they are whole.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayActorError, RayError, RayTaskError, UserCodeException
from ray.util.annotations import RayDeprecationWarning

from teddy_ray.device import environment, prepare
from teddy_ray.engine import Machine, choose_kernels
from teddy_ray.errors import InputError, StageError
from teddy_ray.fingerprints import fingerprint
from teddy_ray.moments import Moments
from teddy_ray.plan import MERGE_TASKS, Plan
from teddy_ray.recipe import Statistics as StatisticsPart
from teddy_ray.stages.chunks import Chunk, ChunkWorker
from teddy_ray.stages.dispatch import own_error
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.machine import machine_of
from teddy_ray.stages.quiet import RESTARTABLE_ACTOR, without_lines
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import POOLED, merge_chunks, pool_classes, to_tensors

NO_PROGRESS_TIMEOUT_S = 6 * 3600.0
"""After so long without a chunk Ray Data gives up: more than any chunk takes, less than for ever."""

MAX_ATTEMPTS = 5
"""Rounds in a row without a chunk."""

IN_FLIGHT = 2
"""Chunks that a worker has."""

POLL_S = 0.5


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
    """Publish the chunks that are not there yet. Returns images per second of all workers, their start-up left out.

    In rounds, each on the workers that fit then, for a pool of Ray Data does not grow with the cluster. What lost
    workers had in hand is for the next round.
    """
    storage, part = session.storage, session.recipe.statistics
    missing = _missing(storage, chunks)
    if not missing:
        return 0.0
    total, rows, idle_rounds = len(missing), list[dict[str, Any]](), 0
    settings = {
        "plan": session.plan,
        "storage": storage,
        "source": session.source_ref,
        "machine": machine,
        "kernels": kernels,
        "poster": session.board.poster("statistics"),
    }
    with (
        session.hiring(part, at_most=total) as num_workers,
        session.progress.stage("statistics", total, "chunks") as bar,
    ):
        show = session.board.shown_on(bar, "statistics")
        while missing:
            running, size, cut_short = {chunk.fingerprint: chunk.name for chunk in missing}, num_workers(), False
            round_ = _round(missing, settings, part, size)

            def tick(running: dict[str, str] = running) -> None:
                num_workers()  # which tells of nodes that come and go
                show(total - len(running), list(running.values()))

            with _ticking(tick):
                for row in round_:
                    rows.append(row)
                    del running[row["fingerprint"]]
                    num_workers.at_most = len(running)
                    if cut_short := _is_worth_more(num_workers(), size, len(running)):
                        break
            round_.close()
            left = _missing(storage, missing)
            num_workers.at_most = len(left)
            idle_rounds = idle_rounds + 1 if len(left) == len(missing) else 0
            if idle_rounds == MAX_ATTEMPTS:
                remedy = "if they ran out of memory, lower statistics.batch_size, or run fewer workers per node"
                raise StageError("statistics", left[0].name, f"its workers were lost {MAX_ATTEMPTS} times; {remedy}")
            if left and not cut_short:
                session.board.lost("statistics", len(left))
                session.progress.say(f"statistics: lost the workers of {len(left)} chunks, which are done again")
            missing = left
        show(total, [])
    if not rows:
        return 0.0
    seconds = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    return float(sum(row["num_images"] for row in rows) / seconds)


def _missing(storage: Storage, chunks: Sequence[Chunk]) -> list[Chunk]:
    published = storage.published("chunk")
    return [chunk for chunk in chunks if chunk.fingerprint not in published]


def _is_worth_more(num_workers: int, size: int, num_left: int) -> bool:
    """Whether a new round on more workers saves more than twice what it loses: the chunks under way, and a start."""
    return num_workers > size and num_left / size - num_left / num_workers > 2 * IN_FLIGHT


def _round(
    chunks: Sequence[Chunk], settings: dict[str, Any], part: StatisticsPart, size: int
) -> Generator[dict[str, Any], None, None]:
    """Rows of chunks as they are done. Those of workers that are lost do not come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.max_errored_blocks = -1  # the chunks that a lost worker had; what the work itself raises comes in a row
    context.max_consecutive_actor_init_deaths = MAX_ATTEMPTS
    items = [{"fingerprint": chunk.fingerprint, "start": chunk.rows.start, "stop": chunk.rows.stop} for chunk in chunks]
    with warnings.catch_warnings():
        # max_task_retries has no other way in yet; before Ray 2.64 takes this one away, see whether it needs one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ChunkWorker,
            batch_size=1,
            fn_constructor_kwargs=settings,
            # one in hand and one that waits: none idles between two, and few are left to one worker in the end
            compute=ray.data.ActorPoolStrategy(size=min(size, len(items)), max_tasks_in_flight_per_actor=IN_FLIGHT),
            # half a CPU per thread: a pool that takes every CPU hangs (ray issue 44687)
            num_cpus=0.5 * part.threads,
            num_gpus=part.gpus_per_worker,
            # a lost worker starts again where there is room; its chunks do not wait for it, for that may be never
            ray_remote_args_fn=lambda: {"max_task_retries": 0},
        )
    try:
        with without_lines(RESTARTABLE_ACTOR):
            for row in dataset.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])  # noqa: S301  # from our own worker
                yield row
    except (RayActorError, ExecutionTimeoutError):  # workers lost before they were up, or all of them
        return
    except (RayTaskError, UserCodeException) as error:
        raise own_error(error, "statistics", "a chunk of the data") from None


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
