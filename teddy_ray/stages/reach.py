"""Whether every node of a cluster can read what the run needs: its storage, and the data."""

from __future__ import annotations

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.errors import InputError, Problem
from teddy_ray.sources import Source
from teddy_ray.stages.executor import result_of
from teddy_ray.storage import Storage

TIMEOUT_S = 60.0


def check_reach(storage: Storage, source: Source) -> None:
    """Raises InputError where a node does not see the storage or the data, as with folders of one machine alone.

    Nodes that do not answer are passed over: they may be leaving.
    """
    probe = f"artifacts/.staging/{storage.session}/probe"
    storage.write(probe, b"")
    there = ray.put(source)
    remote = ray.remote(num_cpus=0, max_retries=0)(_look)
    tasks = []
    for node in ray.nodes():
        if node["Alive"]:
            on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = remote.options(scheduling_strategy=on).remote(storage, probe, there)
            tasks.append((task, node["NodeManagerAddress"]))
    answered, _ = ray.wait([task for task, _ in tasks], num_returns=len(tasks), timeout=TIMEOUT_S)
    problems = {}
    for task, address in tasks:
        if task not in answered:
            continue
        try:
            sees = result_of(task, "cluster", f"node {address}")
        except RayError:
            continue
        if not sees:
            remedy = f"node {address} of the cluster does not see this folder; give a URI that all nodes can open"
            problems["storage"] = Problem("storage", storage.uri, remedy)
    storage.delete_file(probe)
    if problems:
        raise InputError(problems.values())


def _look(storage: Storage, probe: str, source: Source) -> bool:
    if len(source.train):
        source.train.read(np.arange(1))  # raises what names the file
    return storage.is_file(probe)
