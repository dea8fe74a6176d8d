"""How long a plan takes on so many workers, before anything runs: measured or assumed rates, scheduled as stages do.

Every piece of work is handed out to simulated workers by the real dispatcher. Pool and statistics, which Ray Train and
Ray Data schedule in reality, are supposed to be handed out so too. `assumptions` tells what is supposed, a line each.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from teddy_ray.errors import InputError, Problem
from teddy_ray.plan import MERGE_TASKS, STAGES, Plan
from teddy_ray.recipe import Placed
from teddy_ray.stages.dispatch import Dispatcher, Done, Outcome, Up
from teddy_ray.storage import Storage
from teddy_ray.summary import read_summary
from teddy_ray.work import Job, Phase, flops_of_stages, moment_bytes, phases

ASSUMED_TFLOPS = {"GPU": 10.0, "CPU thread": 0.05}
"""Effective 10^12 operations per second where nothing was measured. GPU: SRe2L++'s published 2.52 s per image of
ImageNet-1k on an RTX 4090, 4,000 steps of a ResNet-18, come to 11.6. CPU thread: tests/benchmarks/RESULTS.md has up to
0.18; small models and images reach a tenth of it."""

DECODE_S_PER_PIXEL = 1.6e-7
"""Of a thread, per pixel of an image as the recipe wants it: CIFAR-10's JPEGs took 78 to 257 us (RESULTS.md)."""

STORAGE_BYTES_PER_S = 100e6
"""Of one task that reads or writes."""

PASS_S = 2e-3
"""What a batch takes to go through a model at least, there or back: small ones are bound by their launch."""

RAY_START_S = 4.0
START_S = {"pool": 20.0, "statistics": 7.0, "synthesis": 6.0, "labels": 4.0, "evaluation": 2.0}
"""From the start of a stage to the first work of its workers: processes, imports, models."""

LADDER = (1, 8, 64, 512)
REST = "start, publication"
KINDS = ("member", "unit", "shard", "student")
"""Artifacts that a stage which goes on finds done."""


@dataclass(frozen=True)
class Rates:
    """What a worker does in a second.

    flops: operations, by stage. pass_s: seconds of a pass at least, decode_s: of a thread per decoded image; both 0
    where the measured rates hold them. origin: lines that say where they are from.
    """

    flops: Mapping[str, float]
    pass_s: float
    decode_s: float
    origin: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A whole run on so many workers. wall_s: by stage, and REST; busy_s: by stage, seconds of all workers at work."""

    workers: int
    wall_s: Mapping[str, float]
    busy_s: Mapping[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.wall_s.values())

    @property
    def hours_held(self) -> float:
        """Worker hours, if all workers are there from the beginning to the end."""
        return self.workers * self.total_s / 3600

    @property
    def hours_at_work(self) -> float:
        return sum(self.busy_s.values()) / 3600


# -- rates -------------------------------------------------------------------------------------------------------------


def rates_for(plan: Plan, storage: Storage, *, run: str | None = None, teraflops: float | None = None) -> Rates:
    """From a run of this storage, that of the recipe's name unless told, or assumed where there is none or told so.

    Raises InputError where there is no run of the name that was told.
    """
    name = run or plan.recipe.name
    summary = read_summary(storage, name) if teraflops is None else None
    if run is not None and not (summary and summary["flops"]):
        where = storage.display(f"runs/{run}")
        raise InputError([Problem("--rates", run, f"should be the name of a finished run; there is none at {where}")])
    return measured(plan, summary) if summary and summary["flops"] else assumed(plan, teraflops)


def assumed(plan: Plan, teraflops: float | None = None) -> Rates:
    """The same for all work, per GPU or CPU thread."""
    flops = {stage: _assumed_flops(getattr(plan.recipe, stage), teraflops) for stage in STAGES}
    each = _each(plan, STAGES, teraflops)
    why = "as --teraflops says" if teraflops else f"uncalibrated: no run named {plan.recipe.name} is in this storage"
    data = plan.recipe.data
    decode_s = DECODE_S_PER_PIXEL * data.image_size**2
    return Rates(
        flops,
        PASS_S,
        decode_s,
        (
            f"rates: {each}, and {1000 * PASS_S:g} ms per pass of a batch at least, ASSUMED ({why}). To measure: run "
            "the recipe under another name on the same hardware with few images, steps and epochs, then plan with "
            "--rates NAME",
            f"decoding: {1000 * decode_s:.2g} ms per image and thread, ASSUMED; it goes on beside the models of pool "
            f"({plan.recipe.pool.threads} thread(s)) and statistics ({plan.recipe.statistics.decoders} decoder(s)), "
            "and before those of students of all data",
        ),
    )


def measured(plan: Plan, summary: Mapping[str, Any]) -> Rates:
    """Those of a run, stage by stage."""
    seconds = {stage: facts["worker_seconds"] for stage, facts in summary["stages"].items()}
    known = {stage: work / seconds[stage] for stage, work in summary["flops"].items() if work and seconds[stage]}
    each = ", ".join(f"{stage} {rate / 1e9:.3g}" for stage, rate in known.items())
    lines = [f"rates: measured by the run {summary['name']} ({summary['device']}), GFLOP/s per worker: {each}"]
    share = sum(summary["flops"].values()) / sum(flops_of_stages(plan).values())
    lines.append(
        f"that run did {share:.2g} times the operations of this whole plan; its reading, decoding, start of models and "
        "waiting are in its rates: from a much smaller run times are too long, from another model, image size or "
        "device they are wrong"
    )
    missing = [stage for stage, work in flops_of_stages(plan).items() if work and stage not in known]
    if missing:
        lines.append(f"it did no {' or '.join(missing)}: {_each(plan, missing)} ASSUMED")
    return Rates({**assumed(plan).flops, **known}, 0.0, 0.0, tuple(lines))


def _each(plan: Plan, stages: Iterable[str], teraflops: float | None = None) -> str:
    """What is assumed of the workers of some stages."""
    pieces = sorted({_piece(getattr(plan.recipe, stage)) for stage in stages}, reverse=True)
    return " and ".join(f"{teraflops or ASSUMED_TFLOPS[piece]:g} TFLOP/s per {piece}" for piece in pieces)


def _piece(part: Placed) -> str:
    return "GPU" if part.gpus_per_worker else "CPU thread"


def _assumed_flops(part: Placed, teraflops: float | None) -> float:
    return (teraflops or ASSUMED_TFLOPS[_piece(part)]) * 1e12 * (part.gpus_per_worker or part.threads)


# -- schedules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Timed:
    """A job with its time."""

    name: str
    key: Hashable
    seconds: float


@dataclass
class _Simulated:
    """Workers of one speed under a clock of their own, each up `start_s` after it is asked for. None is lost."""

    start_s: float
    now: float = 0.0
    _numbers: Iterator[int] = field(default_factory=count)
    _events: list[tuple[float, int, Outcome]] = field(default_factory=list)

    def start(self) -> int:
        worker = next(self._numbers)
        self._push(self.start_s, worker, Up())
        return worker

    def submit(self, worker: int, item: _Timed) -> None:
        self._push(item.seconds, worker, Done(None))

    def wait(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        """Goes on to the next event, however far, and gives all of that moment."""
        self.now = self._events[0][0]
        events = []
        while self._events and self._events[0][0] == self.now:
            events.append(heapq.heappop(self._events)[1:])
        return events

    def stop(self, worker: int) -> None:
        self._events = [event for event in self._events if event[1] != worker]
        heapq.heapify(self._events)

    def clock(self) -> float:
        return self.now

    def _push(self, seconds: float, worker: int, outcome: Outcome) -> None:
        heapq.heappush(self._events, (self.now + seconds, worker, outcome))


def dispatched_s(jobs: Sequence[tuple[Hashable, float]], workers: int, start_s: float = 0.0) -> float:
    """Seconds until the last of (key, seconds) is done, handed out as units are: of one key never two at a time."""
    cluster, ended = _Simulated(start_s), 0.0
    items = (_Timed(str(position), key, seconds) for position, (key, seconds) in enumerate(jobs))
    dispatcher = Dispatcher[_Timed](
        "plan", cluster, lambda: workers, exclusive=lambda item: item.key, clock=cluster.clock
    )
    for _ in dispatcher.run(items):
        ended = cluster.now
    return ended


# -- prediction --------------------------------------------------------------------------------------------------------


def published(plan: Plan, storage: Storage) -> frozenset[str]:
    """Fingerprints of what is there already, of stages and of their pieces."""
    stages = {found for stage, found in plan.stages().items() if storage.has(stage, found)}
    return frozenset(stages.union(*(storage.published(kind) for kind in KINDS)))


def left(plan: Plan, there: Collection[str]) -> tuple[Phase, ...]:
    """The work that is not there yet."""
    stages = plan.stages()
    missing = []
    for phase in phases(plan):
        jobs = tuple(job for job in phase.jobs if not job.fingerprints or not set(job.fingerprints) <= set(there))
        if jobs and stages[phase.stage] not in there:
            missing.append(Phase(phase.stage, phase.like, phase.what, jobs))
    return tuple(missing)


def fewest_workers(plan: Plan, work: Sequence[Phase]) -> int:
    """Below so many it cannot run."""
    return plan.recipe.pool.workers_per_base if any(phase.like == "pool" for phase in work) else 1


def most_workers(plan: Plan, phase: Phase) -> int:
    """More than so many do not help: its jobs, and what the recipe asks for."""
    part: Placed = getattr(plan.recipe, phase.like)
    each = plan.recipe.pool.workers_per_base if phase.like == "pool" else 1
    useful = phase.num_parallel * each
    return useful if part.num_workers == "auto" else min(useful, part.num_workers)


def worker_counts(plan: Plan, work: Sequence[Phase]) -> tuple[int, ...]:
    """The columns of a table where nobody asks for others: from the fewest possible to the most that help any stage."""
    fewest = fewest_workers(plan, work)
    most = max([fewest, *(min(LADDER[-1], most_workers(plan, phase)) for phase in work)])
    return tuple(sorted({fewest, most, *(number for number in LADDER if fewest < number < most)}))


def predict(
    plan: Plan, rates: Rates, workers: int, work: Sequence[Phase], *, cores: int | None = None
) -> Prediction | None:
    """The run on so many workers; None where they are fewer than share a training.

    work: what is left of the plan. cores: of the only machine, where all workers share them; None: each has its own.
    """
    if workers < fewest_workers(plan, work):
        return None
    wall = {stage: 0.0 for stage in plan.stages()}
    busy = dict(wall)
    for phase in work:
        part: Placed = getattr(plan.recipe, phase.like)
        used = min(workers, most_workers(plan, phase))
        slower = max(1.0, used * part.threads / cores) if cores else 1.0
        sharing = plan.recipe.pool.workers_per_base if phase.like == "pool" else 1
        seconds = [slower * _seconds(plan, rates, phase, job, sharing) for job in phase.jobs]
        busy[phase.stage] += sharing * sum(seconds)
        start_s = slower * START_S[phase.like]
        keyed = [(job.key, one) for job, one in zip(phase.jobs, seconds, strict=True)]
        wall[phase.stage] += dispatched_s(keyed, used // sharing, start_s)
        if phase.what == "chunks":
            wall[phase.stage] += merge_bytes(plan) / STORAGE_BYTES_PER_S / min(MERGE_TASKS, workers)
    wall[REST] = RAY_START_S + 2 * plan.label_bytes / STORAGE_BYTES_PER_S if work else 0.0
    return Prediction(workers, wall, busy)


def merge_bytes(plan: Plan) -> int:
    """What merging the moments reads, at most: where every chunk holds all classes, as of data in random order."""
    num_classes = min(len(plan.data.classes), plan.chunk_size)
    return len(list(plan.chunks())) * num_classes * moment_bytes(plan)


def _seconds(plan: Plan, rates: Rates, phase: Phase, job: Job, sharing: int) -> float:
    """Of each of the workers that share a job."""
    recipe = plan.recipe
    threads = {"pool": recipe.pool.threads, "statistics": recipe.statistics.decoders}.get(phase.like, 1)
    computing = max(job.flops / rates.flops[phase.like] / sharing, job.passes * rates.pass_s)
    decoding = job.decoded * rates.decode_s / threads / sharing
    return computing + decoding if phase.like == "evaluation" else max(computing, decoding)


# -- what is supposed --------------------------------------------------------------------------------------------------


def assumptions(plan: Plan, rates: Rates, work: Sequence[Phase]) -> Iterator[str]:
    """What a prediction rests on, a line each."""
    recipe, per_base = plan.recipe, plan.recipe.pool.workers_per_base
    yield from rates.origin
    yield "most workers that help: " + "; ".join(_limit(plan, phase) for phase in work)
    yield (
        "all workers are alike and there from the beginning, each with a GPU (or its share) and CPUs of its own; none "
        "is lost"
    )
    yield (
        "every start reads all of the data once, which is not counted: of class folders in a bucket a request per "
        "image, hours for a million; pack them into Parquet files (cluster/README.md)"
    )
    starts = ", ".join(f"{phase.what} {START_S[phase.like]:g}" for phase in work)
    yield f"seconds of start-up, as on two busy CPU cores with local storage: Ray {RAY_START_S:g}, {starts}"
    if per_base > 1 and any(phase.like == "pool" for phase in work):
        yield f"{per_base} workers share a training at no cost: the exchange of gradients is not counted"
    if any(phase.what == "fine-tunings" for phase in work):
        yield "operations of a pruned model fall with the square of the channels that are left"
    rate = f"{STORAGE_BYTES_PER_S / 1e6:g} MB/s per task"
    if any(phase.what == "chunks" for phase in work):
        yield f"merging moments reads {merge_bytes(plan):,} bytes at most (data in random order), at {rate}"
    yield f"publication copies {plan.label_bytes:,} bytes of labels through one process, at {rate}"
    unseen = ["augmentation", "optimisers", "compilation", "PNG", "latency of the storage"]
    if recipe.synthesis.start == "mosaic":
        unseen.insert(0, "scoring of mosaics")
    yield f"not counted where rates are assumed: {', '.join(unseen)}"
    yield (
        "cost = worker hours x the price of a worker: held, if all stay from beginning to end; at work, if an "
        "autoscaler takes idle ones away at once"
    )


def _limit(plan: Plan, phase: Phase) -> str:
    part: Placed = getattr(plan.recipe, phase.like)
    most, num = most_workers(plan, phase), len(phase.jobs)
    why = ""
    if part.num_workers != "auto" and most == part.num_workers:
        why = f", {phase.like}.num_workers"
    elif phase.num_parallel < num:
        why = f": {num} in {phase.num_parallel} groups of classes, one of a group at a time"
    return f"{phase.what} {most}{why}"
