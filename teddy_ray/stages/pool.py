"""Stage 1, on Ray Train: the pool M. Snapshots of early trajectories, or pruned and fine-tuned copies of a trained
base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError  # what Ray Train says itself; our errors come as they are
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.checkpoints import Checkpoint, saved_digest
from teddy_ray.data_parallel import Group, join_group
from teddy_ray.device import describe, environment, prepare
from teddy_ray.engine import Machine, check_machine
from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.members import build_for, check_member, check_rows, load_member, publish_member
from teddy_ray.models import Classifier
from teddy_ray.plan import Plan
from teddy_ray.pool import Labelled, measure, recalibrated, train
from teddy_ray.pool_plan import Member, Training
from teddy_ray.progress import Bar
from teddy_ray.pruning import prune
from teddy_ray.recipe import Pool
from teddy_ray.sources import Images, Source
from teddy_ray.sources.loader import Loader
from teddy_ray.stages.board import Poster
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.machine import machine_of
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.training import State

MAX_ATTEMPTS = 5


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
    task = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker, max_retries=MAX_ATTEMPTS)(_check)
    num_tasks = session.workers(part, at_most=len(plan.members))
    shares = [plan.members[first::num_tasks] for first in range(num_tasks)]
    references = [task.remote(plan, session.storage, session.source_ref, share) for share in shares]
    for reference in references:
        result_of(reference, "pool", "the check of its members")


def _check(plan: Plan, storage: Storage, source: Source, members: Sequence[Member]) -> None:
    device = prepare(plan.recipe.pool.threads, plan.recipe.pool.gpus_per_worker)
    validation = _labelled(source.validation, plan.recipe.pool, keep=False)
    for member in members:
        check_member(plan, storage, member, validation, device)


def _labelled(images: Images, pool: Pool, *, keep: bool = True) -> Labelled:
    # never closed: the process ends with its work
    return Labelled(Loader(images, pool.keep_bytes if keep else 0, num_threads=pool.threads).ahead, images.labels)


@dataclass(frozen=True)
class _Job:
    """What a training worker is given."""

    plan: Plan
    trainings: Sequence[Training]
    source: ray.ObjectRef[Source]
    storage: Storage
    machine: Machine
    poster: Poster


def _train_missing(session: Session, trainings: Sequence[Training], what: str) -> None:
    """Train those of which a member is missing, several at a time. What lost workers had finished stays."""
    storage = session.storage
    if not (missing := _missing(storage, trainings)):
        return
    session.start()
    machine = machine_of(session.recipe.pool, "pool")
    with session.progress.stage("pool", len(missing), what) as bar:
        attempts, before = 0, _marks(storage, missing)
        while missing:
            attempts += 1
            _train_on_ray(session, missing, machine, bar, last_attempt=attempts == MAX_ATTEMPTS)
            missing = _missing(storage, missing)
            if (after := _marks(storage, missing)) != before:  # what gets on may be lost as often as it likes
                attempts, before = 0, after


def _missing(storage: Storage, trainings: Sequence[Training]) -> list[Training]:
    """Those of which a member is not published."""
    published = storage.published("member")
    return [one for one in trainings if any(member.fingerprint not in published for member in one.members)]


def _marks(storage: Storage, trainings: Sequence[Training]) -> dict[str, str | None]:
    """How far each training has come, in a form that can be compared."""
    return {one.name: saved_digest(storage, "training", one.fingerprint) for one in trainings}


def _train_on_ray(
    session: Session, trainings: Sequence[Training], machine: Machine, bar: Bar, *, last_attempt: bool
) -> None:
    """One run of Ray Train, which may lose workers: not on the last attempt."""
    pool = session.recipe.pool
    job = _Job(session.plan, trainings, session.source_ref, session.storage, machine, session.board.poster())
    per_base = pool.workers_per_base
    num_workers = session.workers(pool, at_most=len(trainings) * per_base)
    if num_workers < per_base:
        remedy = f"{num_workers} worker(s) of the pool fit on the cluster at once; lower it"
        raise InputError([Problem("pool.workers_per_base", per_base, remedy)])
    # As a task, for Ray Train takes over Ctrl-C where it runs, and leaves the driver no time to show progress.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    task = remote.remote(job, num_workers // per_base * per_base)
    show = session.board.shown_on(bar)
    while not ray.wait([task], timeout=0.5)[0]:
        show(0, [training.name for training in trainings])
    names = ", ".join(training.name for training in trainings)
    failures = result_of(task, "pool", names)
    # A failure of the work itself ends the run; a lost worker is replaced, and trainings go on from their checkpoints.
    for failure in failures:
        if isinstance(failure, InputError | StageError):
            raise failure
    lost = [failure for failure in failures if isinstance(failure, RayActorError | RayTrainError | ConnectionError)]
    if failures and (last_attempt or not lost):
        raise StageError("pool", names, "; ".join(map(str, failures)))
    if failures:
        session.progress.say(f"pool: {len(lost)} worker(s) lost; going on from the last epoch of each training")


def _fit(job: _Job, num_workers: int) -> list[Exception]:
    """Run Ray Train. Returns why workers failed, empty where none did."""
    pool = job.plan.recipe.pool
    resources: dict[str, float] = {"CPU": pool.threads}
    if pool.gpus_per_worker:
        resources["GPU"] = pool.gpus_per_worker
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=pool.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # of all workers; those that share a training make a group of their own, with nccl where it fits
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name="pool",
            storage_path=job.storage.session_folder("train"),
            storage_filesystem=job.storage.fs,
            # what is run again is asked of the storage, by the driver: Ray Train would begin with all of it
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0, controller_failure_limit=3
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        return list(error.worker_failures.values())
    return []


def _train_worker(config: dict[str, Any]) -> None:
    """Runs in each worker: trains every num_groups-th training, alone or with the others of its group."""
    job: _Job = config["job"]
    pool, context = job.plan.recipe.pool, ray.train.get_context()
    device = prepare(pool.threads, pool.gpus_per_worker)
    if device.type == "cuda":
        device = ray.train.torch.get_device()  # Ray Train shows every worker all GPUs of its node
    check_machine(device, job.machine, job.plan.recipe.cluster.address)
    own_gpus = device.type == "cuda" and pool.gpus_per_worker >= 1
    group = join_group(context.get_world_rank(), context.get_world_size(), pool.workers_per_base, own_gpus=own_gpus)
    source: Source = ray.get(job.source)
    train_part, validation = _labelled(source.train, pool), _labelled(source.validation, pool)
    num_groups = context.get_world_size() // group.size
    for training in job.trainings[context.get_world_rank() // group.size :: num_groups]:
        _Trainer(job, training, train_part, validation, device, group).run()


class _Trainer:
    """One training in one worker: from its start or its last epoch, publishing each member as it comes."""

    def __init__(
        self,
        job: _Job,
        training: Training,
        data: Labelled,
        validation: Labelled,
        device: torch.device,
        group: Group,
    ) -> None:
        self._plan, self._storage, self._poster, self._training = job.plan, job.storage, job.poster, training
        self._data, self._validation, self._device, self._group = data, validation, device, group
        precision = self._plan.recipe.pool.precision
        self._bf16 = precision == "bf16" or (precision == "auto" and job.machine.fast_bf16)
        here = {**environment(device, kernels=False), "bf16": self._bf16}
        self._checkpoint = Checkpoint(self._storage, "training", training.fingerprint, here)
        self._started = time.monotonic()

    def run(self) -> None:
        pool, training = self._plan.recipe.pool, self._training
        state = State.begin(self._start().to(self._device), pool.weight_decay)
        if (saved := self._load_checkpoint()) is not None:
            self._started -= float(saved.pop("seconds"))
            state.restore(saved)
        resumed_at = state.epoch
        if self._group.sum_number(resumed_at) != resumed_at * self._group.size:
            reason = "its workers found different checkpoints; run it on nodes of one kind"
            raise StageError("pool", training.name, reason)
        if self._group.rank == 0:  # the first epoch may take long
            note = f"in epoch {state.epoch + 1}/{training.epochs}"
            self._poster(training.name, state.epoch / training.epochs, note)
        members = {member.epoch: member for member in training.members}
        epochs = train(
            state,
            training,
            self._data,
            pool,
            num_classes=len(self._plan.data.classes),
            device=self._device,
            autocast=torch.bfloat16 if self._bf16 else None,
            group=self._group,
        )
        try:
            for state in epochs:
                self._group.average_buffers(state.model)  # so that all go on from what the first one saves
                if self._group.rank == 0:
                    self._report(state)
                    if state.epoch in members:
                        self._publish(members[state.epoch], state, resumed_at)
                    if state.epoch < training.epochs:
                        seconds = torch.tensor(time.monotonic() - self._started)
                        self._checkpoint.save({**state.tensors(), "seconds": seconds})
        except FloatingPointError as error:
            key = "pool.post.learning_rate" if not training.warmup_epochs else "pool.learning_rate"
            raise StageError("pool", training.name, f"{error} ({key})") from None
        if self._group.rank == 0:
            self._checkpoint.drop()

    def _start(self) -> Classifier:
        training, data = self._training, self._plan.recipe.data
        if training.start is None:
            return build_for(self._plan, training.architecture, seed=training.seed)
        model = load_member(self._plan, self._storage, training.start)
        try:
            return prune(model, training.ratio, channels=data.channels, image_size=data.image_size)
        except ValueError as error:
            raise InputError([Problem("pool.post.ratios", training.ratio, str(error))]) from None

    def _load_checkpoint(self) -> dict[str, torch.Tensor] | None:
        saved = self._checkpoint.load()
        if saved is None:
            return None
        published, epoch = self._storage.published("member"), len(saved["losses"])
        lost = [m for m in self._training.members if m.epoch <= epoch and m.fingerprint not in published]
        return None if lost else saved  # a member that somebody deleted comes only of going its way again

    def _publish(self, member: Member, state: State, resumed_at: int) -> None:
        pool = self._plan.recipe.pool
        model = state.model
        if pool.recalibrate and member in self._plan.members:
            model = recalibrated(model, self._data, pool, self._device)
        publish_member(
            self._storage,
            self._plan,
            member,
            model,
            accuracy=measure(model, self._validation, np.arange(len(self._validation.labels)), self._device),
            check_accuracy=measure(model, self._validation, check_rows(len(self._validation.labels)), self._device),
            facts={
                "losses": state.losses,
                "resumed_at": resumed_at,
                "precision": "bf16" if self._bf16 else "fp32",
                "device": describe(self._device),
                "seconds": (time.monotonic() - self._started) * self._group.size,
            },
        )

    def _report(self, state: State) -> None:
        name, epochs = self._training.name, self._training.epochs
        self._poster(name, state.epoch / epochs, f"epoch {state.epoch}/{epochs}, loss {state.losses[-1]:.3f}")
