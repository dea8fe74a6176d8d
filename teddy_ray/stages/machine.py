"""What the workers of a stage can do, asked once by the driver, which may itself run on another kind of machine."""

from __future__ import annotations

import ray

from teddy_ray.device import prepare
from teddy_ray.engine import Machine, inspect_machine
from teddy_ray.recipe import Placed
from teddy_ray.stages.executor import result_of


def machine_of(part: Placed, stage: str) -> Machine:
    """The machine of one of the workers. `engine.check_machine` tells in each of them whether it is like that one."""
    remote = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker)
    machine: Machine = result_of(remote(_inspect).remote(part), stage, "a worker")
    return machine


def _inspect(part: Placed) -> Machine:
    return inspect_machine(prepare(part.threads, part.gpus_per_worker))


def node_id() -> str:
    """The node of Ray that this process runs on; empty where it runs without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
