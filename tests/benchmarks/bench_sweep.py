"""Sweeps of the digits: what sharing saves, the front that Optuna finds, what early stopping saves.

    python tests/benchmarks/bench_sweep.py shared [--each 5]    18 trials as a sweep; every fifth by itself
    python tests/benchmarks/bench_sweep.py optuna               12 trials towards accuracy and bytes
    python tests/benchmarks/bench_sweep.py stopping             12 trials with ASHA

Prints the tables of RESULTS.md. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "digits_sweep.yaml"
SWEEP = [sys.executable, str(ROOT / "pipelines" / "sweep.py"), str(RECIPE)]


def seconds(command: list[str]) -> float:
    """Wall time of a command in a process of its own."""
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def tree(storage: str) -> dict[str, Any]:
    """sweep.json"""
    found: dict[str, Any] = json.loads(Path(storage, "runs/digits_sweep/sweep.json").read_text())
    return found


def alone(number: int, storage: str) -> None:
    """One trial by itself: no Tune, nothing of another trial's."""
    from teddy_ray import flow
    from teddy_ray.progress import Progress
    from teddy_ray.recipe_file import load_recipe
    from teddy_ray.stages.session import Session
    from teddy_ray.sweeps.outcome import measure
    from teddy_ray.sweeps.space import enumerated, trial_recipe

    recipe = load_recipe(RECIPE, [], {"storage": storage})
    assert recipe.sweep is not None
    settings, progress = enumerated(recipe)[number - 1], Progress()
    prepared = flow.prepare(trial_recipe(recipe, settings, "alone"), progress.say, split="validation")
    with contextlib.closing(Session(prepared.plan, prepared.source, prepared.storage, progress)) as session:
        flow.run_stages(session, prepared.given)
    outcome = measure(prepared.plan, prepared.storage, recipe.sweep, settings)
    Path(storage, "accuracy.json").write_text(json.dumps(outcome.metrics["accuracy"]))


def shared(each: int) -> None:
    """Wall time of the sweep over that of its trials one by one."""
    with tempfile.TemporaryDirectory() as storage:
        whole = seconds([*SWEEP, "--storage", storage])
        found = tree(storage)
    trials = found["trials"][::each]
    singly: list[float] = []
    for trial in trials:
        with tempfile.TemporaryDirectory() as storage:
            singly.append(seconds([sys.executable, __file__, "alone", str(trial["number"]), storage]))
            same = json.loads(Path(storage, "accuracy.json").read_text()) == trial["metrics"]["accuracy"]
        print(f"trial {trial['number']} alone: {singly[-1]:.0f} s, same accuracy: {same}", flush=True)
    estimate = sum(singly) / len(singly) * len(found["trials"])
    print("| 18 trials | s |\n| --- | --- |")
    print(f"| a sweep, winner on test included | {whole:.0f} |")
    print(
        f"| one by one, each from nothing ({len(singly)} of them measured, times 18 / {len(singly)}) | {estimate:.0f} |"
    )
    print(f"| ratio | {whole / estimate:.2f} |")
    print(json.dumps(found["made"]))


SPACE = {
    "synthesis.ce_weight": {"log_uniform": [0.03, 3.0]},
    "synthesis.learning_rate": {"log_uniform": [0.003, 0.1]},
}


def optuna() -> None:
    """The front of accuracy and bytes."""
    space = {
        **SPACE,
        "synthesis.images_per_class": {"choice": [1, 2, 5, 10]},
        "labels.views": {"choice": [10, 30, 100]},
    }
    part = {"space": space, "sampler": "optuna", "trials": 12, "objectives": ["accuracy", "bytes"]}
    _print_front(_run(part))


def stopping() -> None:
    """Epochs of students with ASHA."""
    space = {**SPACE, "evaluation.learning_rate": {"log_uniform": [0.0001, 0.05]}}
    part = {"space": space, "sampler": "random", "trials": 12, "stopping": {"grace_epochs": 10, "reduction": 3}}
    found = _run(part)
    _print_front(found)
    epochs = found["student_epochs"]
    print(f"epochs: {epochs}; saved {1 - epochs['trained'] / epochs['without_stopping']:.0%}")


def _run(part: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as storage:
        took = seconds([*SWEEP, "--storage", storage, "--set", f"sweep={json.dumps(part)}"])
        found = tree(storage)
    print(f"{took:.0f} s")
    return found


def _print_front(found: dict[str, Any]) -> None:
    for trial in found["trials"]:
        mark = "front" if trial["number"] in found["front"] else ""
        print(trial["number"], trial["state"], trial["settings"], trial["metrics"], trial["epochs"], mark)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("shared", "optuna", "stopping", "alone"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--each", type=int, default=5, help="an odd number, or all of them are of one generation")
    arguments = parser.parse_args()
    if arguments.what == "alone":
        alone(int(arguments.rest[0]), arguments.rest[1])
    elif arguments.what == "shared":
        shared(arguments.each)
    else:
        {"optuna": optuna, "stopping": stopping}[arguments.what]()
