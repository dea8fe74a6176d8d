"""What every stage is given, and the Ray it runs on: started or joined when the first stage needs it."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from teddy_ray.errors import InputError, Problem
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.recipe import Placed, Recipe
from teddy_ray.sources import Source
from teddy_ray.stages.board import Board
from teddy_ray.storage import Storage

CONNECT_TIMEOUT_S = 5.0
PLACED = ("pool", "statistics", "synthesis", "labels", "evaluation")


@dataclass
class Session:
    """One run of a plan. `board` is where workers post their progress."""

    plan: Plan
    source: Source
    storage: Storage
    progress: Progress
    cpus: float = field(init=False, default=0)
    gpus: float = field(init=False, default=0)
    _started_ray: bool = field(init=False, default=False)

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @cached_property
    def board(self) -> Board:
        return Board()

    @cached_property
    def source_ref(self) -> ray.ObjectRef[Source]:
        """The index of the data in the object store, put there once."""
        return ray.put(self.source)

    def start(self) -> None:
        """Start Ray here, or join the cluster at cluster.address, and check that every stage fits on it."""
        if ray.is_initialized():
            self._read_resources()
            return
        self._started_ray = True
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = cluster_address(self.recipe)
        if address is None:
            cpus, gpus = local_resources()
            self.progress.say(f"starting Ray on this machine ({cpus} CPUs, {gpus} GPUs)")
            # "local", for without an address Ray would join whatever cluster it finds on this machine
            ray.init(address="local", num_cpus=cpus, num_gpus=gpus, dashboard_host="127.0.0.1", **common)
        else:
            try:
                _knock(address)
                ray.init(address=address, **common)
            except (OSError, ValueError, RuntimeError) as error:
                remedy = f"should be a running Ray cluster ({str(error).splitlines()[0]})"
                raise InputError([Problem("cluster.address", address, remedy)]) from None
        _quieten()
        self._read_resources()
        if address is not None:
            self._await_resources()
            self.progress.say(f"joined the Ray cluster at {address} ({self.cpus:g} CPUs, {self.gpus:g} GPUs)")

    def close(self) -> None:
        """End the Ray that this session started."""
        if self._started_ray:
            ray.shutdown()

    def workers(self, part: Placed, *, at_most: int) -> int:
        """How many workers of a stage run at once: no more than it has items, than asked for, than fit."""
        fit = self.cpus // part.threads
        if part.gpus_per_worker:
            fit = min(fit, self.gpus // part.gpus_per_worker)
        asked = at_most if part.num_workers == "auto" else part.num_workers
        return max(1, int(min(at_most, asked, fit)))

    def _read_resources(self) -> None:
        resources = ray.cluster_resources()
        self.cpus, self.gpus = resources.get("CPU", 0), resources.get("GPU", 0)

    def _await_resources(self) -> None:
        deadline = time.monotonic() + self.recipe.cluster.wait_s
        while problems := misfits(self.recipe, self.cpus, self.gpus):
            if not _has_autoscaler() or time.monotonic() > deadline:
                raise InputError(problems)
            from ray.autoscaler.sdk import request_resources

            part: Placed = getattr(self.recipe, problems[0].key.split(".")[0])
            num = 1 if part.num_workers == "auto" else part.num_workers
            request_resources(bundles=[{"CPU": part.threads, "GPU": part.gpus_per_worker}] * num)
            left = deadline - time.monotonic()
            self.progress.say(f"waiting up to {left:.0f} s for the autoscaler: {problems[0]}")
            time.sleep(min(5.0, max(0.1, left)))
            self._read_resources()


def cluster_address(recipe: Recipe) -> str | None:
    """The cluster to join: the recipe's, or that of the job we run in. None where Ray is to be started here."""
    return recipe.cluster.address or os.environ.get("RAY_ADDRESS")


def check_local_resources(recipe: Recipe) -> None:
    """Raises InputError where Ray is to be started here and a stage asks for more than this machine has."""
    if cluster_address(recipe) is None and (problems := misfits(recipe, *local_resources())):
        raise InputError(problems)


def local_resources() -> tuple[int, int]:
    """CPUs and GPUs that this process may use."""
    import torch

    return len(os.sched_getaffinity(0)), torch.cuda.device_count()


def misfits(recipe: Recipe, cpus: float, gpus: float) -> list[Problem]:
    """Why stages do not fit on so many CPUs and GPUs; empty where all do."""
    problems = []
    for stage in PLACED:
        part: Placed = getattr(recipe, stage)
        num = 1 if part.num_workers == "auto" else part.num_workers
        needs = (("gpus_per_worker", part.gpus_per_worker, gpus, "GPUs"), ("threads", part.threads, cpus, "CPUs"))
        for key, each, total, what in needs:
            if num * each <= total:
                continue
            name, value = ("num_workers", num) if each <= total else (key, each)
            asked = f"{num} worker(s) ask for {num * each:g} {what}, the cluster has {total:g}"
            remedy = f"{asked}; lower it, or give cluster.address of a larger cluster"
            problems.append(Problem(f"{stage}.{name}", value, remedy))
    return problems


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port, which Ray itself would go on trying for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _has_autoscaler() -> bool:
    # Ray has no public call for this; its own libraries ask the same way.
    return ray._private.state.state.get_max_resources_from_cluster_config() is not None


def _quieten() -> None:
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
