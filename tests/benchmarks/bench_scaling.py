"""Predicted against measured time of three stages for 1, 2 and 4 workers, and the prediction for ImageNet-1k.

`python tests/benchmarks/bench_scaling.py`, five minutes on a machine that does nothing else. Rates are measured by
smaller runs of one worker, with a quarter of the steps and views, right before; predictions are those of `teddy-ray
plan`, for workers that share this machine's cores.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from teddy_ray import device
from teddy_ray.flow import prepare
from teddy_ray.plan import Plan
from teddy_ray.pool_plan import DataFacts
from teddy_ray.progress import Progress, duration
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import load_recipe, parse_recipe
from teddy_ray.scaling import Rates, assumed, assumptions, left, measured, predict
from teddy_ray.stages.session import Session, local_resources
from teddy_ray.work import flops_of_stages

TIMED = ("statistics", "synthesis", "labels")
KINDS = ("chunk", "moments", "statistics", "unit", "synthesis", "shard", "labels")
IMAGENET = Path(__file__).parents[2] / "pipelines/recipes/imagenet1k.yaml"


def recipe_of(storage: Path, num_workers: int, share: int = 1) -> Recipe:
    """Digits: 13 chunks, ten units in five groups of classes, ten files. share: divides steps and views."""
    return parse_recipe(
        {
            "name": "scaling",
            "storage": str(storage),
            "data": {"source": "sklearn:digits", "image_size": 8, "channels": 1},
            "pool": {"architectures": ["convnet:width=64"], "snapshots": [1, 2, 3]},
            "statistics": {"chunk_size": 100, "num_workers": num_workers},
            "synthesis": {
                "images_per_class": 20,
                "steps": 1200 // share,
                "classes_per_unit": 2,
                "slots_per_unit": 10,
                "compile": False,
                "num_workers": num_workers,
            },
            "labels": {"views": 400 // share, "images_per_file": 20, "num_workers": num_workers},
        }
    )


def run(recipe: Recipe, *stages: str) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The plan, and the manifests of the stages."""
    prepared = prepare(recipe)
    session = Session(prepared.plan, prepared.source, prepared.storage, Progress(io.StringIO()))
    for stage in stages:
        import_module(f"teddy_ray.stages.{stage}").run(session)
    found = prepared.plan.stages()
    return prepared.plan, {stage: prepared.storage.open(stage, found[stage]).manifest for stage in stages}


def calibrate(folder: Path) -> tuple[Rates, str]:
    """Rates of a small run of one worker, and seconds of its stages in which that did not work."""
    clear(folder)
    plan, manifests = run(recipe_of(folder, 1, share=4), *TIMED)
    rest = {stage: facts["seconds"] - facts["worker_seconds"] for stage, facts in manifests.items()}
    flops = {stage: work for stage, work in flops_of_stages(plan).items() if stage in TIMED}
    here = device.describe(device.prepare(1, 0))
    rates = measured(plan, {"name": "a small one", "device": here, "stages": manifests, "flops": flops})
    return rates, ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in rest.items())


def clear(folder: Path) -> None:
    """Forget all but the pool."""
    for kind in KINDS:
        shutil.rmtree(folder / "artifacts" / kind, ignore_errors=True)


def compare(folder: Path) -> None:
    """Prints a row for each stage and number of workers."""
    cores, starts = local_resources()[0], []
    _, manifests = run(recipe_of(folder, 1), "pool")
    starts.append(f"pool {manifests['pool']['seconds'] - manifests['pool']['worker_seconds']:.1f}")
    print("| stage | workers | predicted s | measured s | measured / predicted |\n| --- | --- | --- | --- | --- |")
    for workers in (1, 2, 4):
        rates, rest = calibrate(folder)  # anew each time, for other work on the machine comes and goes
        starts.append(rest)
        clear(folder)
        plan, manifests = run(recipe_of(folder, workers), *TIMED)
        work = tuple(phase for phase in left(plan, ()) if phase.stage == phase.like and phase.stage in TIMED)
        predicted = predict(plan, rates, workers, work, cores=cores)
        assert predicted is not None
        rows = {stage: (predicted.wall_s[stage], manifests[stage]["seconds"]) for stage in TIMED}
        rows["all three"] = (sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values()))
        for stage, (ours, theirs) in rows.items():
            print(f"| {stage} | {workers} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |", flush=True)
    print(f"\nstart-up in the small runs, seconds: {'; '.join(starts)}")
    print(f"load of this machine in the last five minutes: {os.getloadavg()[1]:.1f} on {cores} cores")


def imagenet() -> None:
    """Prints what is predicted for ImageNet-1k, whose 1,281,167 training images need not be there."""
    num_validation = 25_623  # 2 %
    counts = [(1_281_167 - num_validation) // 1000] * 1000
    counts[0] += 1_281_167 - num_validation - sum(counts)
    names = tuple(f"class {label:03d}" for label in range(1000))
    facts = DataFacts(names, tuple(counts), 50_000, "train", "validation", "test", num_validation=num_validation)
    for images_per_class in (10, 50):
        recipe = load_recipe(IMAGENET, [f"synthesis.images_per_class={images_per_class}"])
        plan = Plan(recipe, facts)
        rates, work = assumed(plan), left(plan, ())
        found = [one for workers in (16, 64, 512) if (one := predict(plan, rates, workers, work)) is not None]
        columns = [f"{images_per_class} images per class", *(f"{one.workers} GPUs" for one in found)]
        print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
        for stage in found[0].wall_s:
            print("| " + " | ".join([stage, *(duration(one.wall_s[stage]) for one in found)]) + " |")
        print("| " + " | ".join(["**total**", *(f"**{duration(one.total_s)}**" for one in found)]) + " |")
        print("| " + " | ".join(["GPU hours held", *(f"{one.hours_held:,.0f}" for one in found)]) + " |")
        print("| " + " | ".join(["GPU hours at work", *(f"{one.hours_at_work:,.0f}" for one in found)]) + " |\n")
        print("\n".join(f"- {line}" for line in assumptions(plan, rates, work)))


def main() -> None:
    """Measure, then predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict-only", action="store_true", help="ImageNet-1k alone: seconds")
    if not parser.parse_args().predict_only:
        folder = Path(tempfile.mkdtemp())
        ray.init(address="local", num_cpus=4, object_store_memory=200_000_000, log_to_driver=False)
        try:
            compare(folder)
        finally:
            ray.shutdown()
            shutil.rmtree(folder)
    imagenet()


if __name__ == "__main__":
    main()
