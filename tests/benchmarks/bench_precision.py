"""Accuracy of distilled digits in bfloat16 against float32, paired: `python tests/benchmarks/bench_precision.py`.

One distilled set per seed and precision from one pool, the students the same. Finished work is reused when run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from teddy_ray.flow import distill
from teddy_ray.progress import Progress
from teddy_ray.recipe_file import load_recipe

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "digits.yaml"


def main() -> None:
    """Prints a row per seed, then the mean difference with its standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print("| seed | fp32 | bf16 | difference |\n| --- | --- | --- | --- |")
    differences = []
    for seed in range(arguments.seeds):
        accuracy = {}
        for precision in ("fp32", "bf16"):
            values = {
                "name": f"{precision}-{seed}",
                "seed": seed,
                "storage": arguments.storage,
                "synthesis.precision": precision,
                "evaluation.controls": [],
            }
            summary = distill(load_recipe(RECIPE, values=values), Progress())
            accuracy[precision] = summary.accuracy["distilled"].mean
        differences.append(accuracy["bf16"] - accuracy["fp32"])
        print(f"| {seed} | {accuracy['fp32']:.4f} | {accuracy['bf16']:.4f} | {differences[-1]:+.4f} |", flush=True)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    print(f"\nmean difference {statistics.mean(differences):+.4f} ± {error:.4f} (standard error)")


if __name__ == "__main__":
    main()
