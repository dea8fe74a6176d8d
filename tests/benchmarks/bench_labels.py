"""Bytes of soft labels against the accuracy they give: `python tests/benchmarks/bench_labels.py --storage DIR`.

One distilled set of digits in every form; students of the same seeds, compared in pairs with those of the first
form, which has a view for every epoch. Finished work is reused when run again.

With --data FOLDER (Tiny-ImageNet as Parquet, 64 pixels): bytes and mass kept by labels of many classes, no students.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from teddy_ray.dataset import encode
from teddy_ray.flow import distill, prepare
from teddy_ray.labels import Dense, store
from teddy_ray.progress import Progress
from teddy_ray.recipe_file import load_recipe, parse_recipe
from teddy_ray.stages import labels, pool, synthesis
from teddy_ray.stages import statistics as moments
from teddy_ray.stages.labels import read_labelled
from teddy_ray.stages.session import Session
from teddy_ray.summary import Summary

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "digits.yaml"
EPOCHS = 300
FORMS: Mapping[str, Mapping[str, Any]] = {
    "every class, 300 views": {"views": 300},
    "every class, 100 views": {"views": 100},
    "every class, 30 views": {"views": 30},
    "every class, 10 views": {"views": 10},
    "every class, 1 view": {"views": 1},
    "every class, mean over 300 views": {"views": 300, "averaged": True},
    "every class, mean over 30 views": {"views": 30, "averaged": True},
    "3 classes, 300 views": {"views": 300, "mode": "top_k", "top_k": 3},
    "2 classes, 300 views": {"views": 300, "mode": "top_k", "top_k": 2},
    "1 class, 300 views": {"views": 300, "mode": "top_k", "top_k": 1},
    "3 classes, 60 views": {"views": 60, "mode": "top_k", "top_k": 3},
    "3 classes, 30 views": {"views": 30, "mode": "top_k", "top_k": 3},
    "none, members asked": {"mode": "none"},
}
KEPT = (100, 50, 20, 10, 5, 1)
"""Classes kept of many."""


def digits(storage: str, num_seeds: int) -> Iterator[str]:
    """Rows of the table of forms."""
    yield "| labels | bytes | share | mass kept | accuracy | difference, paired |"
    yield "| --- | --- | --- | --- | --- | --- |"
    first: tuple[int, list[float]] | None = None
    for index, (form, fields) in enumerate(FORMS.items()):
        values = {
            "name": f"labels-{index}",
            "storage": storage,
            "evaluation.controls": [],
            "evaluation.seeds": list(range(num_seeds)),
            "evaluation.epochs": EPOCHS,
            **{f"labels.{key}": value for key, value in fields.items()},
        }
        recipe = load_recipe(RECIPE, values=values)
        summary = distill(recipe, Progress())
        plan, store = (prepared := prepare(recipe)).plan, prepared.storage
        found = [store.open("student", run.fingerprint).manifest["accuracy"] for run in plan.students]
        first = first or (summary.bytes["labels"], found)
        differences = [ours - theirs for ours, theirs in zip(found, first[1], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        share, kept = summary.bytes["labels"] / first[0], summary.labels["mass_kept"]
        yield (
            f"| {form} | {_bytes(summary)} | {share:.1%} | {kept:.3f} "
            f"| {statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} "
            f"| {statistics.mean(differences):+.4f} ± {error:.4f} |"
        )


def _bytes(summary: Summary) -> str:
    members = summary.bytes["members"]
    return f"{summary.bytes['labels']:,}" + (f" (+ {members:,} of members)" if members else "")


def many_classes(storage: str, data: str) -> Iterator[str]:
    """Rows of the table of labels of many classes. The pool is small and early; S are ten real images of each class."""
    yield "| labels | bytes | share | as stored | mass kept |\n| --- | --- | --- | --- | --- |"
    recipe = parse_recipe(
        {
            "name": "many",
            "storage": storage,
            "data": {"source": data, "image_size": 64, "limit_per_class": 50},
            "pool": {"architectures": ["convnet:width=32,depth=4"], "snapshots": [2, 4]},
            "statistics": {"source": "buffers", "scope": "global"},
            "synthesis": {"steps": 1, "learning_rate": 1e-9, "classes_per_unit": 100},
            "labels": {"views": 30, "images_per_file": 1000},
        }
    )
    prepared = prepare(recipe)
    plan, store_ = prepared.plan, prepared.storage
    session = Session(plan, prepared.source, store_, Progress())
    for stage in (pool, moments, synthesis, labels):
        if not store_.has(name := stage.__name__.rpartition(".")[2], plan.stages()[name]):
            stage.run(session)
    rows = read_labelled(store_, plan.labelled(plan.distilled))
    assert isinstance(rows.soft_labels, Dense)
    whole = torch.from_numpy(rows.soft_labels.values).float()
    for k in (None, *KEPT):
        form = {"mode": "top_k", "top_k": k} if k else {}
        planned = replace(plan, recipe=recipe.model_copy(update={"labels": recipe.labels.model_copy(update=form)}))
        stored = store(whole, k)
        encoded, png_bytes = encode(replace(rows, soft_labels=stored), plan.data.classes)
        yield (
            f"| {f'{k} classes' if k else 'every class'} | {planned.label_bytes:,} "
            f"| {planned.label_bytes / plan.label_bytes:.1%} | {len(encoded) - png_bytes:,} | {stored.mass_kept:.3f} |"
        )


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    ray.init(address="local", log_to_driver=False, dashboard_host="127.0.0.1")  # one for all runs
    rows = (
        many_classes(arguments.storage, arguments.data)
        if arguments.data
        else digits(arguments.storage, arguments.seeds)
    )
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
