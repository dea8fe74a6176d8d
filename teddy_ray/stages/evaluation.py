"""Stage 5, on Ray tasks: students on the distilled set and on its controls, measured on the test split."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray

from teddy_ray.device import describe, prepare
from teddy_ray.errors import StageError
from teddy_ray.labels import Views
from teddy_ray.plan import Plan, StudentRun
from teddy_ray.records import Score
from teddy_ray.sources import Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.executor import result_of
from teddy_ray.stages.images import read_set
from teddy_ray.stages.labels import label_sets, read_labelled, views_of
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.students import TrainingSet, train_student
from teddy_ray.training import num_batches


def run(session: Session) -> None:
    """Label the controls, train the students that are not there yet, publish the table's rows."""
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.evaluation
    label_sets(session, [images for images in plan.random_sets if "random_soft" in part.controls], "controls")
    missing = [run for run in plan.students if not storage.has("student", run.fingerprint)]
    if missing:
        session.start()
        job = ray.put(_Job(plan, storage, session.source, session.board.poster()))
        task = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker)(_train)
        limit = session.workers(part, at_most=len(missing))
        with session.progress.stage("evaluation", len(missing), "students") as bar:
            waiting, done, show = list(reversed(missing)), 0, session.board.shown_on(bar)
            running: dict[ray.ObjectRef[None], StudentRun] = {}
            while waiting or running:
                while waiting and len(running) < limit:
                    student = waiting.pop()
                    running[task.remote(student, job)] = student
                finished, _ = ray.wait(list(running), timeout=0.5)
                for reference in finished:
                    result_of(reference, "evaluation", running.pop(reference).name)
                done += len(finished)
                show(done, [student.name for student in running.values()])
    manifests = [storage.open("student", run.fingerprint).manifest for run in plan.students]
    scores = [
        Score(
            row=run.row,
            student=run.student,
            accuracy=manifest["accuracy"],
            labels=run.labels,
            split="test",
            steps=manifest["steps"],
        )
        for run, manifest in zip(plan.students, manifests, strict=True)
    ]
    with storage.publish("evaluation", plan.evaluation) as draft:
        draft.facts = {
            "scores": [score.to_dict() for score in scores],
            "seconds": time.monotonic() - started,
            "worker_seconds": sum(manifest["seconds"] for manifest in manifests),
        }


@dataclass(frozen=True)
class _Job:
    """What every student task is given."""

    plan: Plan
    storage: Storage
    source: Source
    poster: Poster


def _train(run: StudentRun, job: _Job) -> None:
    started = time.monotonic()
    recipe = job.plan.recipe
    device = prepare(recipe.evaluation.threads, recipe.evaluation.gpus_per_worker)
    training = _training_set(run, job)
    test = job.source.test

    def report(epoch: int, loss: float) -> None:
        job.poster(run.name, epoch / run.epochs, f"epoch {epoch}/{run.epochs}, loss {loss:.3f}")

    try:
        accuracy = train_student(
            training,
            (test.read(), test.labels),
            recipe.evaluation,
            architecture=run.student,
            seed=run.seed,
            epochs=run.epochs,
            temperature=recipe.labels.temperature if run.labels == "soft" else 1.0,
            device=device,
            on_epoch=report,
        )
    except FloatingPointError as error:
        raise StageError("evaluation", run.name, f"{error} (evaluation.learning_rate)") from None
    with job.storage.publish("student", run.fingerprint) as draft:
        draft.facts = {
            "name": run.name,
            "accuracy": accuracy,
            "steps": run.epochs * num_batches(len(training.images), recipe.evaluation.batch_size),
            "device": describe(device),
            "seconds": time.monotonic() - started,
        }


def _training_set(run: StudentRun, job: _Job) -> TrainingSet:
    plan, train = job.plan, job.source.train
    if run.images is None:
        labels = plan.recipe.labels
        views = Views(
            seed=plan.recipe.seed,
            set_key=plan.data.train,
            augmentation=labels.augmentation,
            num_views=min(labels.views, run.epochs),
        )
        return TrainingSet(train.read(), views.boxes(train.ids), _one_hot(train.labels, plan))
    if run.labels == "soft":
        rows = read_labelled(job.storage, run.images)
        return TrainingSet(rows.images, views_of(plan, run.images).boxes(rows.ids), rows.soft_labels)
    everything = range(plan.num_images)
    pixels = read_set(plan, job.source, job.storage, run.images, everything)
    classes = np.array(plan.image_labels(everything), dtype=np.int64)
    boxes = views_of(plan, run.images).boxes(plan.image_ids(everything))
    return TrainingSet(pixels, boxes, _one_hot(classes, plan))


def _one_hot(labels: npt.NDArray[np.int64], plan: Plan) -> npt.NDArray[np.float32]:
    """(n,) -> (n 1 classes): one label for all views of an image."""
    one_hot: npt.NDArray[np.float32] = np.eye(len(plan.data.classes), dtype=np.float32)[labels][:, None]
    return one_hot
