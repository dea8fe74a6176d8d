"""Stage 5, on Ray actors: students on the distilled set and on its controls, measured on images that none has seen."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from teddy_ray.device import describe, keep_freed_memory, prepare
from teddy_ray.engine import DTYPES, Machine, check_machine, choose_precision
from teddy_ray.errors import StageError
from teddy_ray.plan import Plan
from teddy_ray.pool import Labelled, measure
from teddy_ray.records import Score
from teddy_ray.replay import Ensemble, TrainingSet
from teddy_ray.sources import Images, Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.crew import work_off
from teddy_ray.stages.images import read_set
from teddy_ray.stages.labels import label_models, label_sets, read_labelled, views_of
from teddy_ray.stages.machine import machine_of, node_id
from teddy_ray.stages.session import Probes, Session
from teddy_ray.storage import Storage
from teddy_ray.student_plan import StudentRun
from teddy_ray.students import train_student
from teddy_ray.training import State, num_batches
from teddy_ray.views import Pixels, Rows, ViewedImages, Views


def run(session: Session) -> None:
    """Label the controls, train the students that are not there yet, publish the table's rows."""
    started = time.monotonic()
    plan, storage = session.plan, session.storage
    label_sets(session, plan.labelled_controls, "controls")
    alone = 1 if session.probes else 0  # what is told of the first may make the others needless
    for students in (plan.students[:alone], plan.students[alone:]):
        _train(session, students)
    manifests = [storage.open("student", run.fingerprint).manifest for run in plan.students]
    scores = [
        Score(
            row=f"{run.row}@{run.epochs}" if run.longer else run.row,
            student=run.student,
            accuracy=manifest["accuracy"],
            validation=manifest["validation_accuracy"],
            labels=run.kind.labels,
            split=plan.split,
            steps=manifest["steps"],
            n_counts=run.kind.n_counts,
        )
        for run, manifest in zip(plan.students, manifests, strict=True)
    ]
    with storage.publish("evaluation", plan.evaluation) as draft:
        draft.facts = {
            "scores": [score.to_dict() for score in scores],
            "seconds": time.monotonic() - started,
            "worker_seconds": sum(manifest["seconds"] for manifest in manifests),
        }


def _train(session: Session, runs: Sequence[StudentRun]) -> None:
    """Train those that are not there yet."""
    plan, storage = session.plan, session.storage
    students = {run.fingerprint: run for run in runs}
    for missing in session.claims.turns("student", lambda: storage.missing("student", students)):
        session.start()
        machine = machine_of(session.recipe.evaluation, "evaluation")
        work_off(
            session,
            "evaluation",
            session.recipe.evaluation,
            [students[fingerprint] for fingerprint in missing],
            at_once=len(missing),
            worker=Teacher,
            settings=(plan, storage, session.source_ref, machine, session.board.poster("evaluation"), session.probes),
            call=lambda worker, student: worker.train.remote(student),
            memory_remedy="lower evaluation.batch_size or evaluation.keep_bytes, or run fewer workers per node",
            title="evaluation",
            what="students",
        )


class Teacher:
    """Trains one student at a time, measures it and publishes what it reached."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        source: Source,
        machine: Machine,
        poster: Poster,
        probes: Probes | None = None,
    ) -> None:
        part = plan.recipe.evaluation
        self._plan, self._storage, self._source, self._poster = plan, storage, source, poster
        self._probes = probes
        self._device = prepare(part.threads, part.gpus_per_worker)
        keep_freed_memory()
        self._machine, self._precision = machine, choose_precision(part.precision, machine.fast_bf16)

    def train(self, run: StudentRun) -> None:
        if self._storage.has("student", run.fingerprint):  # by a worker that was given up too early
            return
        check_machine(self._device, self._machine, self._plan.recipe.cluster.address)
        started = time.monotonic()
        self._poster.begin(run.name)
        part, labels = self._plan.recipe.evaluation, self._plan.recipe.labels
        training = self.training_set(run)
        rates = part.learning_rate if isinstance(part.learning_rate, tuple) else (part.learning_rate,)
        best: tuple[float, float, nn.Module] | None = None  # validation accuracy, rate, model
        for index, rate in enumerate(rates):

            def report(state: State, index: int = index) -> None:
                share = (index + state.epoch / run.epochs) / len(rates)
                self._poster(run.name, share, f"epoch {state.epoch}/{run.epochs}, loss {state.losses[-1]:.3f}")
                if self._probes and run == self._plan.students[0] and state.epoch in self._probes.epochs:
                    self._probes(state.epoch, self._accuracy(state.measured, self._source.validation))

            try:
                model = train_student(
                    training,
                    part,
                    labels,
                    architecture=run.student,
                    seed=run.seed,
                    epochs=run.epochs,
                    learning_rate=rate,
                    device=self._device,
                    dtype=DTYPES[self._precision],
                    on_epoch=report,
                )
            except FloatingPointError as error:
                if len(rates) > 1:
                    continue  # a rate that is too high is what a search is for
                raise StageError("evaluation", run.name, f"{error} (evaluation.learning_rate)") from None
            score = self._accuracy(model, self._source.validation)
            if best is None or score > best[0]:
                best = (score, rate, model)
        if best is None:
            raise StageError("evaluation", run.name, "the loss is not finite at any of evaluation.learning_rate")
        with self._storage.publish("student", run.fingerprint) as draft:
            draft.facts = {
                "name": run.name,
                "node": node_id(),
                "accuracy": self._accuracy(best[2], self._source.test) if self._plan.split == "test" else best[0],
                "validation_accuracy": best[0],
                "learning_rate": best[1],
                "steps": run.epochs * num_batches(len(training), part.batch_size),
                "precision": self._precision,
                "device": describe(self._device),
                "seconds": time.monotonic() - started,
            }
        self._poster.done(run.name, draft.facts["seconds"])

    def _accuracy(self, model: nn.Module, images: Images) -> float:
        """On all images of a split, a batch in memory at a time."""
        data = Labelled(lambda parts: (images.read(part) for part in parts), images.labels)
        return measure(model, data, np.arange(len(images)), self._device)

    def training_set(self, run: StudentRun) -> TrainingSet:
        plan, train, labels = self._plan, self._source.train, self._plan.recipe.labels
        num_classes, plain = len(plan.data.classes), run.kind.plain
        # a hard label serves every view: nothing limits how many there are
        num_views = (1 if plain else plan.num_views(run.epochs)) if run.labelled else None
        if run.images is None:
            views = Views(
                seed=plan.recipe.seed,
                set_key=plan.data.train,
                ids=train.ids,
                augmentation=labels.augmentation,
                cutmix=labels.cutmix,
            )
            decoded = _Decoded(train)
            fits = math.prod(decoded.shape) <= plan.recipe.evaluation.keep_bytes
            viewed = ViewedImages(train.read() if fits else decoded, views)
            return TrainingSet(viewed, train.labels, num_classes, num_views, None)
        views = views_of(plan, run.images, plain=plain)
        if run.labelled:
            rows = read_labelled(self._storage, run.labelled)
            soft = rows.soft_labels or self._ensemble()
            return TrainingSet(ViewedImages(rows.images, views), rows.labels, num_classes, num_views, soft)
        everything = range(plan.num_images)
        pixels = read_set(plan, self._source, self._storage, run.images, everything)
        classes = np.array(plan.image_labels(everything), dtype=np.int64)
        return TrainingSet(ViewedImages(pixels, views), classes, num_classes, num_views, None)

    def _ensemble(self) -> Ensemble:
        """The members themselves, where no labels are stored."""
        labels = self._plan.recipe.labels
        models = label_models(self._plan, self._storage, self._device)
        return Ensemble(models, labels.temperature, labels.ensemble)


@dataclass(frozen=True)
class _Decoded:
    """Images that are decoded for every batch anew."""

    images: Images

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.images), self.images.channels, self.images.image_size, self.images.image_size)

    def __getitem__(self, rows: Rows) -> Pixels:
        return self.images.read(rows)
