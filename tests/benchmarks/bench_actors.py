"""Two units on two actors against the same two on one, one thread each: `python tests/benchmarks/bench_actors.py`.

The whole synthesis stage is timed, the start of its workers included, in turn on one and on two actors.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import ray

from teddy_ray import device
from teddy_ray.flow import prepare
from teddy_ray.progress import Progress
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.stages import pool, synthesis
from teddy_ray.stages import statistics as statistics_stage
from teddy_ray.stages.session import Session

ROUNDS = 2


def recipe_of(storage: Path, steps: int, num_workers: int) -> Recipe:
    """Digits, two units of five classes."""
    return parse_recipe(
        {
            "name": "actors",
            "storage": str(storage),
            "data": {"source": "sklearn:digits", "image_size": 8, "channels": 1, "limit_per_class": 50},
            "pool": {"architectures": ["convnet:width=64"], "snapshots": [1]},
            "synthesis": {
                "images_per_class": 10,
                "steps": steps,
                "classes_per_unit": 5,
                "num_workers": num_workers,
                "compile": False,
            },
        }
    )


def run(recipe: Recipe, *stages: object) -> float:
    """Seconds of the last of the stages."""
    prepared = prepare(recipe)
    session = Session(prepared.plan, prepared.source, prepared.storage, Progress())
    for stage in stages:
        started = time.perf_counter()
        stage.run(session)  # type: ignore[attr-defined]
    return time.perf_counter() - started


def main() -> None:
    """Prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12000)
    steps = parser.parse_args().steps
    folder = Path(tempfile.mkdtemp())
    ray.init(address="local", num_cpus=4, object_store_memory=200_000_000, log_to_driver=False)
    try:
        run(recipe_of(folder, steps, 1), pool, statistics_stage)
        seconds = []
        for _ in range(ROUNDS):
            pair = []
            for num_workers in (1, 2):
                for kind in ("unit", "synthesis"):
                    shutil.rmtree(folder / "artifacts" / kind, ignore_errors=True)
                pair.append(run(recipe_of(folder, steps, num_workers), synthesis))
            seconds.append(pair)
        one, two = (statistics.median(pair[i] for pair in seconds) for i in (0, 1))
        share = statistics.median(pair[1] / pair[0] for pair in seconds)
        print(f"{device.describe(device.prepare(1, 0))}: one actor {one:.1f} s, two actors {two:.1f} s, {share:.0%}")
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
