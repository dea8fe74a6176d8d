"""Whether every node of a cluster can read what the run needs: its storage, and the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.errors import InputError, Problem
from teddy_ray.sources import Source
from teddy_ray.stages.executor import result_of
from teddy_ray.storage import Storage

TIMEOUT_S = 60.0
ANSWER_S = 10.0
"""A worker process may have to start first."""


def check_reach(storage: Storage, source: ray.ObjectRef[Source]) -> None:
    """Raises InputError where a node does not see the storage or the data, as with folders of one machine alone.

    Nodes that do not answer are passed over: they may be leaving.
    """
    probe = f"artifacts/.staging/{storage.session}/probe"
    storage.write(probe, b"")
    problems = {}
    try:
        for task, address in _on_every_node(_look, storage, probe, source, timeout_s=TIMEOUT_S)[0]:
            try:
                sees = result_of(task, "cluster", f"node {address}")
            except RayError:
                continue
            if not sees:
                remedy = f"node {address} of the cluster does not see this folder; give a URI that all nodes can open"
                problems["storage"] = Problem("storage", storage.uri, remedy)
    finally:
        storage.delete_file(probe)
    if problems:
        raise InputError(problems.values())


def all_answer() -> bool:
    """Whether every node that counts as alive is: one that was killed counts for some seconds more."""
    answered, num_nodes = _on_every_node(_nothing, timeout_s=ANSWER_S)
    try:
        ray.get([task for task, _ in answered])
    except RayError:
        return False
    return len(answered) == num_nodes


def _on_every_node(
    function: Callable[..., Any], *arguments: Any, timeout_s: float
) -> tuple[list[tuple[ray.ObjectRef[Any], str]], int]:
    """The tasks that ended in time, each with its node's address, and the number of nodes."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    tasks = {}
    for node in ray.nodes():
        if node["Alive"]:
            on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks[remote.options(scheduling_strategy=on).remote(*arguments)] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_s)
    return [(task, tasks[task]) for task in answered], len(tasks)


def _nothing() -> None:
    pass


def _look(storage: Storage, probe: str, source: Source) -> bool:
    if len(source.train):
        source.train.read(np.arange(1))  # raises what names the file
    return storage.is_file(probe)
