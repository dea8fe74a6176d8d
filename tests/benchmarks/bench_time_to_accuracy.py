"""Seconds of synthesis until images are as good as SRe2L's.

    python tests/benchmarks/bench_time_to_accuracy.py --storage DIR --data FOLDER

FOLDER holds CIFAR-10 as train.parquet and test.parquet.

cifar10_small.yaml with few steps and with its own number, beside cifar10_small_sre2l.yaml with SRe2L's published number
of steps from noise, and with our number of steps from real images. All under the labels of one and the same model and
with students of one recipe, but for the first row, whose labels and loss are SRe2L's own. u, the students' loss and
their schedule are those of cifar10_small_ablation.yaml. What the synthesis adds is the lead over random real images
under the same labels. Finished work is reused when run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from teddy_ray.flow import distill, prepare
from teddy_ray.progress import Progress
from teddy_ray.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
LOSS = {"evaluation.loss": "logit_mse", "evaluation.ce_weight": 0.3}
EQUAL = {"labels.temperature": 1.0, "labels.ensemble": "logits", **LOSS}
REAL = {"synthesis.start": "real", "synthesis.steps": 150, "synthesis.learning_rate": 0.0125}
SRE2L, TEDDY = "cifar10_small_sre2l", "cifar10_small"
OURS = {
    "synthesis.ce_weight": 30.0,
    "labels.members": {"seeds": [0], "epochs": [10]},  # SRe2L's one model is the end of our first trajectory
    **LOSS,
}
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "SRe2L, 1,000 steps from noise, its own labels and loss": (SRE2L, {}),
    "SRe2L, 1,000 steps from noise": (SRE2L, EQUAL),
    "SRe2L, 150 steps from real images": (SRE2L, {**EQUAL, **REAL}),
    "Teddy, 5 steps": (TEDDY, {**OURS, "synthesis.steps": 5}),
    "Teddy, 15 steps": (TEDDY, {**OURS, "synthesis.steps": 15}),
    "Teddy, 150 steps": (TEDDY, {**OURS, "synthesis.steps": 150}),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    ray.init(address="local", log_to_driver=False, dashboard_host="127.0.0.1")  # one for all runs
    print("| synthesis | accuracy | over random, same labels | synthesis, s | of SRe2L's | pool and statistics, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    sre2l = 0.0
    for index, (title, (name, changes)) in enumerate(ROWS.items()):
        values = {
            "name": f"time-to-accuracy-{index}",
            "storage": arguments.storage,
            "data.source": f"{arguments.data}/train.parquet",
            "data.test_source": f"{arguments.data}/test.parquet",
            "labels.views": 300,
            "labels.images_per_file": 50,  # in all rows, so that they share random images
            "evaluation.seeds": list(range(arguments.seeds)),
            "evaluation.controls": ["random_soft"],
            "evaluation.schedule": "cosine",  # as the ablation has it
            **changes,
        }
        recipe = load_recipe(RECIPES / f"{name}.yaml", values=values)
        rows = distill(recipe, Progress()).accuracy
        plan, storage = (prepared := prepare(recipe)).plan, prepared.storage
        seconds = {
            stage: storage.open(stage, plan.stages()[stage]).manifest["worker_seconds"]
            for stage in ("pool", "statistics", "synthesis")
        }
        sre2l = sre2l or seconds["synthesis"]
        distilled, lead = rows["distilled"], rows["distilled"].mean - rows["random_soft"].mean
        print(
            f"| {title} | {distilled.mean:.4f} ± {distilled.std:.4f} | {lead:+.4f} "
            f"| {seconds['synthesis']:.1f} | {seconds['synthesis'] / sre2l:.1%} "
            f"| {seconds['pool'] + seconds['statistics']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
