"""Nodes are killed and added at random under a synthesis: python tests/benchmarks/chaos.py [--minutes 10] [--seed 0].

An emulated cluster of a head and three nodes; 60 units of the digits, first undisturbed, then under fire. Ends with
status 1 where a unit is missing, was done twice or differs in a byte, or more than 15 % of the work was done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import TINY, content_hashes
from emulated import Driver, EmulatedCluster, driver

from teddy_ray.recipe_file import dump_recipe, parse_recipe

RUN_STAGE = str(Path(__file__).parent.parent / "run_stage.py")
MOST_REPEATED = 0.15
CHECKPOINT_S = 2.0
KILL_EVERY_S = (25.0, 50.0)
"""Between two kills: never more than a minute."""
ADD_AFTER_S = (3.0, 20.0)
MOST_NODES = 4


def write_recipe(folder: Path, address: str, steps: int) -> str:
    tree = {
        **TINY,
        "storage": str(folder),
        "cluster": {"address": address},
        "synthesis": {
            **{"images_per_class": 12, "slots_per_unit": 1, "classes_per_unit": 2},
            **{"steps": steps, "checkpoint_s": CHECKPOINT_S},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(parse_recipe(tree)))
    return str(path)


class Metrics:
    """Ray's Prometheus endpoints of all nodes: the last value of each of our series."""

    def __init__(self, cluster: EmulatedCluster) -> None:
        self._ports = [cluster.metrics_port]
        self.values: dict[str, float] = {}

    def look(self) -> None:
        for port in self._ports:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
                    text = reply.read().decode()
            except OSError:
                continue
            for name, value in re.findall(r"^ray_(teddy_\w+?)(?:_total)?\{[^}]*\} (\S+)$", text, re.MULTILINE):
                self.values[name] = float(value)


def in_flight(folder: Path) -> int:
    """Units that have begun and are not done, as far as their checkpoints tell."""
    return len(list(folder.glob("artifacts/.checkpoints/unit/*.safetensors")))


def num_done(folder: Path) -> int:
    return len(list(folder.glob("artifacts/unit/*/manifest.json")))


def disturb(cluster: EmulatedCluster, program: Driver, folder: Path, seed: int, metrics: Metrics) -> tuple[int, int]:
    """Until the program ends. Gives the number of kills, and of those with two units or more in flight."""
    rng, started = random.Random(seed), time.monotonic()
    kills = with_two = 0
    next_kill, adds = started + 15, list[float]()
    while program.process.poll() is None:
        now = time.monotonic()
        if now >= next_kill and len(cluster.nodes) > 1 and in_flight(folder):
            victim = rng.choice(cluster.nodes)
            flying = in_flight(folder)
            cluster.kill(victim)
            kills, with_two = kills + 1, with_two + (flying >= 2)
            print(f"{now - started:6.1f} s: killed a node of {len(cluster.nodes) + 1}, {flying} units in flight, "
                  f"{num_done(folder)} done", flush=True)  # fmt: skip
            next_kill = now + rng.uniform(*KILL_EVERY_S)
            adds += [now + rng.uniform(*ADD_AFTER_S) for _ in range(rng.choice([1, 1, 2]))]
        for due in [due for due in adds if now >= due]:
            adds.remove(due)
            if len(cluster.nodes) < MOST_NODES:
                cluster.add()
                print(f"{now - started:6.1f} s: added a node", flush=True)
        metrics.look()
        time.sleep(0.5)
    return kills, with_two


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long the disturbed run is to last")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}; {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="teddy-chaos-"))
    cluster = EmulatedCluster()
    try:
        base = folder / "base"
        for stage in ("pool", "statistics"):
            with driver(RUN_STAGE, stage, write_recipe(base, cluster.address, 1)) as program:
                assert program.finish(timeout_s=600) == 0, program.text
        steps = calibrate(base, folder / "calibration", cluster, options.minutes)
        quiet, started = copy(base, folder / "quiet"), time.monotonic()
        with driver(RUN_STAGE, "synthesis", write_recipe(quiet, cluster.address, steps)) as program:
            assert program.finish(timeout_s=3600) == 0, program.text
        quiet_s = time.monotonic() - started
        print(f"undisturbed: {num_done(quiet)} units of {steps} steps in {quiet_s:.0f} s", flush=True)

        fire, metrics, started = copy(base, folder / "fire"), Metrics(cluster), time.monotonic()
        with driver(RUN_STAGE, "synthesis", write_recipe(fire, cluster.address, steps)) as program:
            kills, with_two = disturb(cluster, program, fire, options.seed, metrics)
            status = program.finish()
        fire_s = time.monotonic() - started
    finally:
        cluster.close()
    if status:
        print(program.text)
        return 1
    units, done, repeated = num_done(fire), *(metrics.values.get(f"teddy_items_{n}", 0.0) for n in ("done", "repeated"))
    lost = program.text.count("lost the worker of")
    most = repeated + lost * 1.0 / (fire_s * 2 / units)  # a worker posts its progress once a second
    same = content_hashes(quiet, "unit") == content_hashes(fire, "unit")
    left = list(fire.glob("artifacts/.checkpoints/unit/*"))
    print(
        f"disturbed: {units} units in {fire_s:.0f} s; {kills} nodes killed, {with_two} of them with two or more units"
    )
    print(f"in flight; {lost} units lost with their workers. Done again: {repeated:.2f} units, {repeated / units:.1%}")
    print(f"(at most {most / units:.1%}); finished {done:.0f} times; bytes {'identical' if same else 'DIFFER'}")
    shutil.rmtree(folder)
    faults = {
        "bytes differ": not same,
        "units are missing": units < 60,
        "units were done twice": done > units,
        "checkpoints are left": bool(left),
        "fewer kills than minutes": kills < fire_s // 60,
        "no kill with two units in flight": not with_two,
        "too short": fire_s < 60 * options.minutes,
        "too much was done again": most / units > MOST_REPEATED,
    }
    for fault in (text for text, found in faults.items() if found):
        print(f"FAULT: {fault}")
    return int(any(faults.values()))


def copy(base: Path, target: Path) -> Path:
    shutil.copytree(base / "artifacts", target / "artifacts")
    return target


def calibrate(base: Path, folder: Path, cluster: EmulatedCluster, minutes: float) -> int:
    """Steps per unit for a run of about so long."""
    copy(base, folder)
    with driver(RUN_STAGE, "synthesis", write_recipe(folder, cluster.address, 100)) as program:
        assert program.finish(timeout_s=600) == 0, program.text
    seconds = sum(json.loads(path.read_text())["seconds"] for path in folder.glob("artifacts/unit/*/manifest.json"))
    cores = min(len(cluster.nodes), os.cpu_count() or 1)
    return max(200, round(100 * minutes * 60 * cores / seconds))


if __name__ == "__main__":
    sys.exit(main())
