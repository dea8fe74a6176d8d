"""Stage 1, on Ray Train: the pool M. Snapshots of early trajectories, or pruned and fine-tuned copies of a trained
base."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (  # what Ray Train says itself; our errors come as they are
    RayTrainError,
    WorkerGroupStartupTimeoutError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.checkpoints import saved_digest
from teddy_ray.device import prepare
from teddy_ray.engine import Machine
from teddy_ray.errors import InputError, StageError
from teddy_ray.members import check_member
from teddy_ray.plan import Plan
from teddy_ray.pool_plan import Member, Training
from teddy_ray.progress import Bar
from teddy_ray.sources import Source
from teddy_ray.stages.desk import Desk
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.machine import machine_of
from teddy_ray.stages.reach import all_answer
from teddy_ray.stages.session import Session
from teddy_ray.stages.trainer import Job, labelled, train_worker
from teddy_ray.storage import Storage

MAX_ATTEMPTS = 5
POLL_S = 0.5
MOST_TOGETHER = 8
"""Workers of a run of Ray Train, which all go back to their last epoch where one of them is lost."""


def run(session: Session) -> None:
    """Train what is missing, bases before what is made of them, check every member, then publish the list of all."""
    started = time.monotonic()
    plan, storage, models = session.plan, session.storage, session.plan.pool_plan
    _train_missing(session, models.bases, "bases")
    _train_missing(session, models.finetunings, "members")
    check(session)
    manifests = {member: storage.open("member", member.fingerprint).manifest for member in plan.members}
    last = [
        storage.open("member", training.members[-1].fingerprint).manifest
        for training in (*models.bases, *models.finetunings)
    ]
    with storage.publish("pool", plan.pool) as draft:
        draft.facts = {
            "classes": list(plan.data.classes),
            "members": [
                {
                    "name": member.name,
                    "architecture": member.architecture,
                    "ratio": member.ratio,
                    "epoch": member.epoch,
                    "seed": member.seed,
                    "validation_accuracy": manifest["validation_accuracy"],
                    "parameters": manifest["parameters"],
                    "weights_sha256": manifest["files"]["weights.safetensors"]["sha256"],
                    "fingerprint": member.fingerprint,
                }
                for member, manifest in manifests.items()
            ],
            "seconds": time.monotonic() - started,
            "worker_seconds": sum(manifest["seconds"] for manifest in last),
        }


def check(session: Session) -> None:
    """Raises InputError where a member has other classes than the data, or is not as often right as it was."""
    session.start()
    part, plan = session.recipe.pool, session.plan
    task = ray.remote(
        num_cpus=part.threads,
        num_gpus=part.gpus_per_worker,
        max_retries=MAX_ATTEMPTS,
        scheduling_strategy="SPREAD",
    )(_check)
    num_tasks = session.workers(part, at_most=len(plan.members))
    shares = [plan.members[first::num_tasks] for first in range(num_tasks)]
    references = [task.remote(plan, session.storage, session.source_ref, share) for share in shares]
    for reference in references:
        result_of(reference, "pool", "the check of its members")


def _check(plan: Plan, storage: Storage, source: Source, members: Sequence[Member]) -> None:
    device = prepare(plan.recipe.pool.threads, plan.recipe.pool.gpus_per_worker)
    validation = labelled(source.validation, plan.recipe.pool, keep=False)
    for member in members:
        check_member(plan, storage, member, validation, device)


def _train_missing(session: Session, trainings: Sequence[Training], what: str) -> None:
    """Train those of which a member is missing, several at a time. What lost workers had finished stays."""
    storage, by_fingerprint = session.storage, {one.fingerprint: one for one in trainings}

    def look() -> list[str]:
        return [one.fingerprint for one in _missing(storage, trainings)]

    for missing in session.claims.turns("training", look):
        session.start()
        machine = machine_of(session.recipe.pool, "pool")
        at_most = len(missing) * session.recipe.pool.workers_per_base
        with (
            session.hiring(session.recipe.pool, at_most=at_most) as num_workers,
            session.progress.stage("pool", len(missing), what) as bar,
        ):
            these = [by_fingerprint[fingerprint] for fingerprint in missing]
            _Trainings(session, these, machine, num_workers, bar).run()


def _missing(storage: Storage, trainings: Sequence[Training]) -> list[Training]:
    """Those of which a member is not published."""
    published = storage.published("member")
    return [one for one in trainings if any(member.fingerprint not in published for member in one.members)]


class _Trainings:
    """Trainings on runs of Ray Train: one with all workers that fit, and another wherever more come to fit."""

    def __init__(
        self,
        session: Session,
        trainings: Sequence[Training],
        machine: Machine,
        num_workers: Callable[[], int],
        bar: Bar,
    ) -> None:
        self._session, self._trainings, self._machine, self._num_workers = session, trainings, machine, num_workers
        self._storage, self._bar, self._desk = session.storage, bar, Desk.open(len(trainings))
        self._runs: dict[ray.ObjectRef[list[Exception]], _Run] = {}
        self._attempts, self._marks = 0, self._how_far()
        self._unsettled = False  # a node may have died that still counts as alive

    def run(self) -> None:
        """Train them all."""
        show = self._session.board.shown_on(self._bar, "pool")
        while (left := self._desk.num_left()) or self._runs:
            self._start(left)
            if not self._runs:  # a node has to come first
                time.sleep(POLL_S)
                continue
            for task in ray.wait(list(self._runs), timeout=POLL_S)[0]:
                self._end(self._runs.pop(task), result_of(task, "pool", self._names))
            show(0, [training.name for training in self._trainings])

    @property
    def _names(self) -> str:
        return ", ".join(training.name for training in self._trainings)

    def _start(self, num_left: int) -> None:
        """A run of Ray Train, where trainings are left and workers fit that do not work yet."""
        pool = self._session.recipe.pool
        per_base = pool.workers_per_base
        fit = min(self._num_workers(), self._session.nodes.room(pool))  # which may be none
        free = fit - sum(run.num_workers for run in self._runs.values())
        most = per_base if self._session.at_work else max(per_base, MOST_TOGETHER)
        num_groups = min(num_left, free // per_base, most // per_base)
        if num_groups < 1 or (self._unsettled and not all_answer()):
            return
        self._unsettled = False
        session, run = self._session, _Run(uuid.uuid4().hex, num_groups * per_base)
        self._desk.reserve(run.name, num_groups)
        poster = session.board.poster("pool")
        job = Job(
            session.plan,
            self._trainings,
            session.source_ref,
            self._storage,
            self._machine,
            poster,
            self._desk,
            run.name,
        )
        # As a task, for Ray Train takes over Ctrl-C where it runs, and leaves the driver no time to show progress.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._runs[remote.remote(job, run.num_workers)] = run

    def _end(self, run: _Run, failures: Sequence[Exception]) -> None:
        """A failure of the work itself ends it all; of a lost worker, trainings go on from their checkpoints."""
        for failure in failures:
            if isinstance(failure, InputError | StageError):
                raise failure
        if not failures:
            return
        lost = [failure for failure in failures if _is_loss(failure)]
        self._unsettled = True
        self._attempts += not all(isinstance(failure, WorkerGroupStartupTimeoutError) for failure in failures)
        if (marks := self._how_far()) != self._marks:  # what gets on may be lost as often as it likes
            self._attempts, self._marks = 0, marks
        if not lost or self._attempts == MAX_ATTEMPTS:
            raise StageError("pool", self._names, "; ".join(map(str, failures)))
        missing = _missing(self._storage, self._trainings)
        self._desk.put_back(run.name, [i for i, one in enumerate(self._trainings) if one not in missing])
        self._session.board.lost("pool", len(lost))
        self._session.progress.say(f"pool: {len(lost)} worker(s) lost; going on from the last epoch of each training")

    def _how_far(self) -> dict[str, str | None]:
        """How far each training has come, in a form that can be compared."""
        return {
            one.name: saved_digest(self._storage, "training", one.fingerprint)
            for one in _missing(self._storage, self._trainings)
        }


def _is_loss(failure: Exception) -> bool:
    """Whether a worker went, rather than its work being wrong."""
    went = isinstance(failure, RayError) and not isinstance(failure, RayTaskError)
    return went or isinstance(failure, RayTrainError | ConnectionError)


@dataclass(frozen=True)
class _Run:
    """A run of Ray Train under way."""

    name: str
    num_workers: int


def _fit(job: Job, num_workers: int) -> list[Exception]:
    """Run Ray Train. Returns why workers failed, empty where none did."""
    pool = job.plan.recipe.pool
    resources: dict[str, float] = {"CPU": pool.threads}
    if pool.gpus_per_worker:
        resources["GPU"] = pool.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=pool.gpus_per_worker > 0,
            resources_per_worker=resources,
            # over all nodes, but those that share a training close to each other
            placement_strategy="SPREAD" if pool.workers_per_base == 1 else "PACK",
        ),
        # of all workers; those that share a training make a group of their own, with nccl where it fits
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name=f"pool-{job.taker}",
            storage_path=job.storage.session_folder("train"),
            storage_filesystem=job.storage.fs,
            # what is run again is asked of the storage, by the driver: Ray Train would begin with all of it
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        return list(error.worker_failures.values())
    except ray.train.ControllerError as error:  # such as workers that could not be placed, for a node has gone
        return [error.controller_failure]
    except RayTrainError as error:  # such as a node that was told to go
        return [error]
    return []
