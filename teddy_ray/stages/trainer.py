"""One worker of Ray Train: takes trainings from the desk, one after another, and publishes each member as it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train.torch
import torch

from teddy_ray.checkpoints import Checkpoint
from teddy_ray.data_parallel import Group, join_group
from teddy_ray.device import describe, environment, keep_freed_memory, prepare
from teddy_ray.engine import DTYPES, Machine, check_machine, choose_precision
from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.members import build_for, check_rows, load_member, publish_member
from teddy_ray.models import Classifier
from teddy_ray.plan import Plan
from teddy_ray.pool import Labelled, measure, recalibrated, train
from teddy_ray.pool_plan import Member, Training
from teddy_ray.pruning import prune
from teddy_ray.recipe import Pool
from teddy_ray.sources import Images, Source
from teddy_ray.sources.loader import Loader
from teddy_ray.stages.board import Poster
from teddy_ray.stages.desk import Desk
from teddy_ray.stages.machine import node_id
from teddy_ray.storage import Storage
from teddy_ray.training import State


def labelled(images: Images, pool: Pool, *, keep: bool = True) -> Labelled:
    """Images as trainings read them. keep: those that were decoded, as far as pool.keep_bytes goes."""
    # never closed: the process ends with its work
    return Labelled(Loader(images, pool.keep_bytes if keep else 0, num_threads=pool.threads).ahead, images.labels)


@dataclass(frozen=True)
class Job:
    """What a worker is given. taker: as a Desk takes it."""

    plan: Plan
    trainings: Sequence[Training]
    source: ray.ObjectRef[Source]
    storage: Storage
    machine: Machine
    poster: Poster
    desk: Desk
    taker: str


def train_worker(config: dict[str, Any]) -> None:
    """Runs in each worker: trains what the desk gives, alone or with the others of its group."""
    job: Job = config["job"]
    pool, context = job.plan.recipe.pool, ray.train.get_context()
    device = prepare(pool.threads, pool.gpus_per_worker)
    if device.type == "cuda":
        device = ray.train.torch.get_device()  # Ray Train shows every worker all GPUs of its node
    keep_freed_memory()
    check_machine(device, job.machine, job.plan.recipe.cluster.address)
    own_gpus = device.type == "cuda" and pool.gpus_per_worker >= 1
    group = join_group(context.get_world_rank(), context.get_world_size(), pool.workers_per_base, own_gpus=own_gpus)
    source: Source = ray.get(job.source)
    train_part, validation = labelled(source.train, pool), labelled(source.validation, pool)
    for training in job.desk.trainings(job.taker, job.trainings, group):
        _Trainer(job, training, train_part, validation, device, group).run()


class _Trainer:
    """One training in one worker: from its start or its last epoch, publishing each member as it comes."""

    def __init__(
        self,
        job: Job,
        training: Training,
        data: Labelled,
        validation: Labelled,
        device: torch.device,
        group: Group,
    ) -> None:
        self._plan, self._storage, self._poster, self._training = job.plan, job.storage, job.poster, training
        self._data, self._validation, self._device, self._group = data, validation, device, group
        self._precision = choose_precision(self._plan.recipe.pool.precision, job.machine.fast_bf16)
        here = {**environment(device, kernels=False), "precision": self._precision}
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
            self._poster.begin(training.name, state.epoch / training.epochs, note)
        members = {member.epoch: member for member in training.members}
        epochs = train(
            state,
            training,
            self._data,
            pool,
            num_classes=len(self._plan.data.classes),
            device=self._device,
            dtype=DTYPES[self._precision],
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
            self._poster.done(training.name, time.monotonic() - self._started)
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
                "node": node_id(),
                "losses": state.losses,
                "resumed_at": resumed_at,
                "precision": self._precision,
                "device": describe(self._device),
                "seconds": (time.monotonic() - self._started) * self._group.size,
            },
        )

    def _report(self, state: State) -> None:
        name, epochs = self._training.name, self._training.epochs
        self._poster(name, state.epoch / epochs, f"epoch {state.epoch}/{epochs}, loss {state.losses[-1]:.3f}")
