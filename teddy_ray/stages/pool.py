"""Stage 1, on Ray Train: train the bases and keep their snapshots, the pool M = {T_1, ..., T_e}."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError  # what Ray Train says itself; our errors come as they are
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from teddy_ray.device import prepare
from teddy_ray.errors import InputError, StageError
from teddy_ray.models import Classifier, build, freeze
from teddy_ray.plan import Base, Member, Plan
from teddy_ray.pool import train_base
from teddy_ray.progress import Bar
from teddy_ray.recipe import Pool
from teddy_ray.sources import Images, Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage

MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class _Job:
    """What a training worker is given."""

    pool: Pool
    bases: Sequence[Base]
    source: ray.ObjectRef[Source]
    storage: Storage
    poster: Poster


def run(session: Session) -> None:
    """Train the bases that are not there yet, several at a time, then publish the list of members."""
    started = time.monotonic()
    plan, storage = session.plan, session.storage
    missing = [base for base in plan.bases if not storage.has("base", base.fingerprint)]
    if missing:
        session.start()
        with session.progress.stage("pool", len(missing), "bases") as bar:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if _train(session, missing, bar, last_attempt=attempt == MAX_ATTEMPTS):
                    break
                missing = [base for base in missing if not storage.has("base", base.fingerprint)]
    manifests = {base: storage.open("base", base.fingerprint).manifest for base in plan.bases}
    with storage.publish("pool", plan.pool) as draft:
        draft.facts = {
            "classes": list(plan.data.classes),
            "members": [
                {
                    "name": member.name,
                    "architecture": member.base.architecture,
                    "seed": member.base.seed,
                    "epoch": member.epoch,
                    "validation_accuracy": manifests[member.base]["validation_accuracy"][str(member.epoch)],
                    "base": member.base.fingerprint,
                    "file": member.file,
                }
                for member in plan.members
            ],
            "seconds": time.monotonic() - started,
            "worker_seconds": sum(manifest["seconds"] for manifest in manifests.values()),
        }


def load_members(plan: Plan, storage: Storage, members: Sequence[Member]) -> list[nn.Module]:
    """The members' models, frozen, in evaluation mode, on the CPU."""
    return [freeze(_load(plan, storage, member)) for member in members]


def _load(plan: Plan, storage: Storage, member: Member) -> Classifier:
    data = plan.recipe.data
    model = build(
        member.base.architecture,
        num_classes=len(plan.data.classes),
        channels=data.channels,
        image_size=data.image_size,
    )
    model.load_state_dict(storage.open("base", member.base.fingerprint).tensors(member.file))
    return model


def _train(session: Session, bases: Sequence[Base], bar: Bar, *, last_attempt: bool) -> bool:
    """One run of Ray Train over the bases. False where workers were lost and it should be run again."""
    pool = session.recipe.pool
    job = _Job(pool, bases, session.source_ref, session.storage, session.board.poster())
    num_workers = session.workers(pool, at_most=len(bases))
    # As a task, for Ray Train takes over Ctrl-C where it runs, and leaves the driver no time to show progress.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(job, num_workers)
    show = session.board.shown_on(bar)
    while not ray.wait([task], timeout=0.5)[0]:
        show(0, [base.name for base in bases])
    names = ", ".join(base.name for base in bases)
    failures = result_of(task, "pool", names)
    # A failure of the work itself ends the run; a lost worker is replaced, and bases it had published stay.
    for failure in failures:
        if isinstance(failure, InputError | StageError):
            raise failure
    lost = all(isinstance(failure, RayActorError | RayTrainError) for failure in failures)
    if failures and (last_attempt or not lost):
        raise StageError("pool", names, "; ".join(map(str, failures)))
    if failures:
        session.progress.say(f"pool: {len(failures)} worker(s) lost; training again what they had not finished")
    return not failures


def _fit(job: _Job, num_workers: int) -> list[Exception]:
    """Run Ray Train. Returns why workers failed, empty where none did."""
    resources: dict[str, float] = {"CPU": job.pool.threads}
    if job.pool.gpus_per_worker:
        resources["GPU"] = job.pool.gpus_per_worker
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=job.pool.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # each worker trains bases of its own, so the process group carries nothing that would want nccl
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name="pool",
            storage_path=job.storage.session_folder("train"),
            storage_filesystem=job.storage.fs,
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=3),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        return list(error.worker_failures.values())
    return []


def _train_worker(config: dict[str, Any]) -> None:
    """Runs in each worker: trains and publishes every num_workers-th base."""
    job: _Job = config["job"]
    context = ray.train.get_context()
    device = prepare(job.pool.threads, job.pool.gpus_per_worker)
    if device.type == "cuda":
        device = ray.train.torch.get_device()  # Ray Train shows every worker all GPUs of its node
    source: Source = ray.get(job.source)
    train, validation = source.train.read(), source.validation.read()
    for base in job.bases[context.get_world_rank() :: context.get_world_size()]:
        _publish_base(base, job, source.train, train, (validation, source.validation.labels), device)


def _publish_base(base: Base, job: _Job, index: Images, images: Any, validation: Any, device: Any) -> None:
    started = time.monotonic()
    accuracies: dict[str, float] = {}
    losses: list[float] = []
    num_epochs = job.pool.snapshots[-1]
    with job.storage.publish("base", base.fingerprint) as draft:

        def keep(epoch: int, model: nn.Module, accuracy: float) -> None:
            accuracies[str(epoch)] = accuracy
            draft.write_tensors(Member(base, epoch).file, model.state_dict())

        def report(epoch: int, loss: float) -> None:
            losses.append(loss)
            job.poster(base.name, epoch / num_epochs, f"epoch {epoch}/{num_epochs}, loss {loss:.3f}")

        try:
            train_base(
                images,
                index.labels,
                validation,
                job.pool,
                architecture=base.architecture,
                seed=base.seed,
                num_classes=len(index.classes),
                device=device,
                on_snapshot=keep,
                on_epoch=report,
            )
        except FloatingPointError as error:
            raise StageError("pool", base.name, f"{error} (pool.learning_rate)") from None
        draft.facts = {
            "architecture": base.architecture,
            "seed": base.seed,
            "classes": list(index.classes),
            "validation_accuracy": accuracies,
            "losses": losses,
            "seconds": time.monotonic() - started,
        }
