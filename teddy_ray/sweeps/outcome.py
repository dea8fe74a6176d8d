"""What came of a trial, read from its artifacts; and the ledger of a sweep, which keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from teddy_ray.plan import Plan
from teddy_ray.recipe import Sweep
from teddy_ray.records import Score, tabulate
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.summary import member_bytes

MADE_BY = ("pool", "statistics", "synthesis", "labels")
"""The stages that make a distilled set."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial. key: of its ledger entry, from all that decides the outcome.

    metrics: accuracy and improvement as fractions, on the validation part (mean of n students, whose sample standard
    deviation is std, None for one); images, images_per_class; bytes as stored; seconds of workers for pool,
    statistics, synthesis and labels, as if the trial had been alone. Empty where the trial did not finish, but for the
    accuracy where it was stopped.
    epochs: of students, that were trained. reason: why it failed.
    """

    key: str
    settings: Mapping[str, Any]
    state: Literal["finished", "stopped", "failed"]
    metrics: Mapping[str, float | None]
    epochs: int
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def key_of(plan: Plan, sweep: Sweep) -> str:
    """Equal for trials with the same outcome: with early stopping, that depends on the rungs, too."""
    rungs = sweep.stopping.model_dump(mode="json") if sweep.stopping else None
    return sha256(to_json([plan.evaluation, rungs]).encode())[:32]


def measure(plan: Plan, storage: Storage, sweep: Sweep, settings: Mapping[str, Any]) -> Outcome:
    """The outcome of a trial whose stages are all published."""
    manifests = {stage: storage.open(stage, fingerprint).manifest for stage, fingerprint in plan.stages().items()}
    rows = tabulate(Score(**score) for score in manifests["evaluation"]["scores"])
    distilled, random = rows["distilled"], rows.get("random_soft")
    shards = (storage.open("shard", shard.fingerprint) for shard in plan.shards(plan.labelled(plan.distilled)))
    stored = sum(file["bytes"] for shard in shards for file in shard.manifest["files"].values())
    members = member_bytes(plan, storage) if plan.recipe.labels.mode == "none" else 0
    metrics = {
        "accuracy": distilled.mean,
        "std": distilled.std,
        "n": distilled.n,
        "improvement": distilled.mean - random.mean if random else None,
        "images": plan.num_images,
        "images_per_class": plan.recipe.synthesis.images_per_class,
        "bytes": stored + members,
        "seconds": sum(manifests[stage]["worker_seconds"] for stage in MADE_BY),
    }
    epochs = sum(run.epochs for run in plan.students)
    return Outcome(key=key_of(plan, sweep), settings=settings, state="finished", metrics=metrics, epochs=epochs)


def failed(key: str, settings: Mapping[str, Any], reason: str) -> Outcome:
    """The outcome of a trial that ended before its students did."""
    return Outcome(key=key, settings=settings, state="failed", metrics={}, epochs=0, reason=reason)


class Ledger:
    """runs/<name>/trials/: a file per trial that is over, so that no sweep does it again.

    It is named by the outcome's key and the trial's number: where trials are drawn, two may come to the same.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, f"{folder}/trials"

    def read(self) -> list[tuple[int, Outcome]]:
        """Number and outcome of each, by number. What is no outcome of this version is passed over."""
        found = []
        for path in self._storage.files(self._folder):
            try:
                outcome = Outcome(**json.loads(self._storage.read(path)))
                number = int(path.rpartition("-")[2].removesuffix(".json"))
            except (ValueError, TypeError):
                continue
            found.append((number, outcome))
        return sorted(found, key=lambda each: (each[0], each[1].key))

    def write(self, number: int, outcome: Outcome) -> None:
        """Keep it. Failures are not kept: they are tried again."""
        if outcome.state != "failed":
            self._storage.write(f"{self._folder}/{outcome.key}-{number}.json", to_json(outcome.to_dict()).encode())
        self._storage.delete_file(self._begun(number))

    def begin(self, number: int, settings: Mapping[str, Any]) -> None:
        """Keep the settings of a trial that was drawn, so that it can be gone on with."""
        self._storage.write(self._begun(number), to_json(settings).encode())

    def begun(self) -> list[dict[str, Any]]:
        """Settings of trials that began and are not over, by number."""
        return [json.loads(self._storage.read(path)) for path in self._storage.files(f"{self._folder}/begun")]

    def _begun(self, number: int) -> str:
        return f"{self._folder}/begun/{number:06d}.json"
