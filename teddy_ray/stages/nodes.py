"""What the nodes of a cluster hold, and which stages fit on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teddy_ray.errors import Problem
from teddy_ray.plan import STAGES
from teddy_ray.recipe import Placed, Pool, Recipe


@dataclass(frozen=True)
class Nodes:
    """CPUs and GPUs of each node. A worker lies on one node whole, so totals do not tell what fits."""

    resources: Sequence[tuple[float, float]]

    def room(self, part: Placed) -> int:
        """How many workers of a stage fit at once."""
        return sum(self._room_on(node, part) for node in self.resources)

    def __str__(self) -> str:
        cpus, gpus = (sum(node[kind] for node in self.resources) for kind in (0, 1))
        return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(self.resources)} node(s)"

    def _room_on(self, node: tuple[float, float], part: Placed) -> int:
        by_cpu = int(node[0] // part.threads)
        if not part.gpus_per_worker:
            return by_cpu
        # a share lies on one GPU; 1 / 0.2 is no whole number, nor is 1 // 0.2 five
        per_gpu = int(1 / part.gpus_per_worker + 1e-9) if part.gpus_per_worker < 1 else 1 / part.gpus_per_worker
        return min(by_cpu, int(int(node[1]) * per_gpu))


def misfits(recipe: Recipe, nodes: Nodes) -> list[Problem]:
    """Why stages do not fit on the nodes; empty where all do."""
    problems = []
    for stage in STAGES:
        part: Placed = getattr(recipe, stage)
        num = fewest(part)
        room = nodes.room(part)
        if room >= num:
            continue
        alone = room == 0 and part.gpus_per_worker > 0
        asked = "num_workers" if part.num_workers != "auto" else "workers_per_base"
        key, value = ("gpus_per_worker", part.gpus_per_worker) if alone else (asked, num)
        if room == 0 and not alone:
            key, value = "threads", part.threads
        each = f"{part.threads} CPU(s) and {part.gpus_per_worker:g} GPU(s)"
        remedy = f"lower it, or give cluster.address of a larger cluster: {num} worker(s) of {each} each do not fit on "
        problems.append(Problem(f"{stage}.{key}", value, remedy + str(nodes)))
    return problems


def bundles(part: Placed, num_workers: int) -> list[dict[str, float]]:
    """What so many workers of a stage need, as Ray's autoscaler is asked for it."""
    gpus = {"GPU": part.gpus_per_worker} if part.gpus_per_worker else {}  # named at all, it brings nodes with GPUs
    return [{"CPU": part.threads, **gpus}] * num_workers


def fewest(part: Placed) -> int:
    """How many workers of a stage have to fit at once."""
    if part.num_workers != "auto":
        return part.num_workers
    return part.workers_per_base if isinstance(part, Pool) else 1
