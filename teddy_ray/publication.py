"""runs/<name>/: the recipe, the summary, the report, and the distilled data set with its card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from teddy_ray.card import write_card
from teddy_ray.dataset import CARD, DISTILLED, FACTS, FORMAT, MEMBERS, PARTS, seal, shard_name
from teddy_ray.errors import InputError, Problem
from teddy_ray.members import WEIGHTS, normalisation
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.recipe import result_fields
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.report import write_report
from teddy_ray.sources import Source
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.summary import RECIPE, REPORT, SUMMARY, Summary


def check_run_folder(storage: Storage, name: str, *, mark: str = RECIPE, what: str = "run") -> None:
    """Raises InputError where runs/<name> is something that no run of ours wrote, or none of this kind.

    mark: a file that every such folder holds. what: they are called.
    """
    folder = f"runs/{name}"
    is_ours = storage.is_file(f"{folder}/{mark}") or storage.is_empty(folder)
    if storage.is_file(folder) or (storage.is_folder(folder) and not is_ours):
        remedy = f"this is not a {what} of teddy-ray and is left alone; choose another name or storage"
        raise InputError([Problem("name", storage.display(folder), remedy)])


def move_aside(
    storage: Storage, folder: str, theirs: str, *, marks: Sequence[str] = (), what: str, progress: Progress
) -> None:
    """Give what stands in a folder a name of its own, that begins with its identity `theirs`. marks: as
    `Storage.move_folder` takes them. what: it is called."""
    names = itertools.chain([f"{folder}~{theirs[:8]}"], (f"{folder}~{theirs[:8]}.{i}" for i in itertools.count(2)))
    kept = next(name for name in names if not storage.is_folder(name))
    storage.move_folder(folder, kept, marks=marks)
    progress.say(f"{storage.display(folder)} held {what}; it is now {storage.display(kept)}")


def identity_of(storage: Storage, path: str) -> str | None:
    """What a JSON file says its `identity` is; unknown where it cannot be told, None where there is no such file."""
    if not storage.is_file(path):
        return None
    try:
        return str(json.loads(storage.read(path))["identity"])
    except (ValueError, KeyError, TypeError):  # no version of ours writes such, but it is somebody's
        return "unknown"


def publish_run(plan: Plan, source: Source, storage: Storage, summary: Summary, progress: Progress) -> None:
    """Write runs/<name>/. A run of another recipe that stands there is kept under a name of its own."""
    folder = f"runs/{plan.recipe.name}"
    _make_room(storage, folder, summary, progress)
    storage.write(f"{folder}/{RECIPE}", dump_recipe(plan.recipe).encode())
    _publish_set(plan, storage, f"{folder}/{DISTILLED}", summary, progress)
    storage.write(f"{folder}/{REPORT}", write_report(plan, source, storage, summary).encode())
    storage.write(f"{folder}/{SUMMARY}", to_json(summary.to_dict()).encode())


def _publish_set(plan: Plan, storage: Storage, folder: str, summary: Summary, progress: Progress) -> None:
    """Write the distilled set, unless it is there already. What else lies in its folder is left alone."""
    card = write_card(plan, summary).encode()
    facts, before = _facts(plan, storage, summary, card), _read_facts(storage, folder)
    same = ("format", "fingerprints", "license", "origin")
    there = {path.removeprefix(f"{folder}/") for part in PARTS for path in storage.files(f"{folder}/{part}")}
    is_whole = there == set(before.get("files", ()))  # another run may have deleted some, or left its own
    if is_whole and all(before.get(key) == {**facts, "format": FORMAT}[key] for key in same):
        return
    storage.delete_file(f"{folder}/{FACTS}")  # written last: without it there is no set
    for part in PARTS:  # what another or an interrupted publication left would be read as data
        storage.delete_folder(f"{folder}/{part}")
    edited = storage.is_file(f"{folder}/{CARD}") and "card" in before
    if edited and sha256(storage.read(f"{folder}/{CARD}")) != before["card"]:
        progress.say(f"{storage.display(folder)}/{CARD} was edited and is left as it is")
    else:
        storage.write(f"{folder}/{CARD}", card)
    for name, data in seal(_distilled_files(plan, storage), facts):
        storage.write(f"{folder}/{name}", data)


def _read_facts(storage: Storage, folder: str) -> dict[str, Any]:
    """What teddy.json says, if there is one that can be read."""
    if not storage.is_file(f"{folder}/{FACTS}"):
        return {}
    try:
        return dict(json.loads(storage.read(f"{folder}/{FACTS}")))
    except (ValueError, TypeError):
        return {}


def _make_room(storage: Storage, folder: str, summary: Summary, progress: Progress) -> None:
    if not storage.is_file(f"{folder}/{SUMMARY}"):
        return
    try:
        theirs = str(json.loads(storage.read(f"{folder}/{SUMMARY}"))["stages"]["evaluation"]["fingerprint"])
    except (ValueError, KeyError, TypeError):  # no version of ours writes such, but it is somebody's
        theirs = "unknown"
    if theirs == summary.stages["evaluation"]["fingerprint"]:
        return
    marks = [f"{DISTILLED}/{FACTS}", SUMMARY]
    move_aside(storage, folder, theirs, marks=marks, what="a run of another recipe", progress=progress)


def _distilled_files(plan: Plan, storage: Storage) -> Iterator[tuple[str, bytes]]:
    shards = plan.shards(plan.labelled(plan.distilled))
    for index, shard in enumerate(shards):
        yield shard_name(index, len(shards)), storage.open("shard", shard.fingerprint).read("rows.parquet")
    if plan.recipe.labels.mode == "none":
        for index, member in enumerate(plan.label_members):
            yield _member_name(index), storage.open("member", member.fingerprint).read(WEIGHTS)


def _member_name(index: int) -> str:
    return f"{MEMBERS}/{index:05d}.safetensors"


def _members(plan: Plan, storage: Storage) -> Iterator[dict[str, Any]]:
    """What it takes to build the published members."""
    for index, member in enumerate(plan.label_members):
        manifest = storage.open("member", member.fingerprint).manifest
        mean, std = normalisation(plan)
        yield {
            "file": _member_name(index),
            "architecture": member.architecture,
            "structure": manifest["structure"],
            "code": plan.code.get(member.architecture),
            "mean": mean,
            "std": std,
        }


def _facts(plan: Plan, storage: Storage, summary: Summary, card: bytes) -> dict[str, Any]:
    """teddy.json: what made the set. Nothing of where or when."""
    recipe = plan.recipe
    labels = recipe.labels
    fields = result_fields(recipe)
    del fields["data"]["source"], fields["data"]["test_source"]
    return {
        "classes": list(plan.data.classes),
        "images_per_class": recipe.synthesis.images_per_class,
        "image_size": recipe.data.image_size,
        "channels": recipe.data.channels,
        "card": sha256(card),
        "license": recipe.data.license,
        "origin": recipe.data.origin,
        "recipe": fields,
        "recipe_sha256": sha256(to_json(fields).encode()),
        "data": {"train": plan.data.train, "validation": plan.data.validation, "test": plan.data.test},
        "fingerprints": plan.stages(),
        "pool": list(summary.pool),
        "views": {
            "seed": recipe.seed,
            "set_key": plan.distilled.fingerprint,
            "augmentation": result_fields(labels.augmentation),
            "cutmix": labels.cutmix,
            "formation": recipe.synthesis.formation,
        },
        "labels": {
            "mode": labels.mode,
            "num_views": 1 if labels.averaged else labels.views if labels.mode != "none" else None,
            "averaged": labels.averaged,
            "ensemble": labels.ensemble,
            "temperature": labels.temperature,
            "top_k": labels.top_k,
        },
        "members": list(_members(plan, storage)) if labels.mode == "none" else [],
        "versions": dict(summary.versions),
    }
