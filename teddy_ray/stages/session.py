"""What every stage is given, and the Ray it runs on: started or joined when the first stage needs it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray
from ray._private.utils import get_num_cpus  # knows the CPU quota of a container
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from teddy_ray.errors import InputError, Problem
from teddy_ray.plan import STAGES, Plan
from teddy_ray.progress import Progress
from teddy_ray.recipe import Placed, Pool, Recipe
from teddy_ray.sources import Source
from teddy_ray.stages.board import Board
from teddy_ray.storage import Storage

CONNECT_TIMEOUT_S = 5.0


@dataclass
class Session:
    """One run of a plan. `board` is where workers post their progress."""

    plan: Plan
    source: Source
    storage: Storage
    progress: Progress
    nodes: Nodes = field(init=False)
    _connected: bool = field(init=False, default=False)

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
        self._connected = True
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns that this will be its default
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = cluster_address(self.recipe)
        with _signals_kept():
            self._connect(address, common)
        _quieten()
        self._read_resources()
        if address is not None:
            self._await_resources()
            self.progress.say(f"joined the Ray cluster at {address} ({self.nodes})")

    def _connect(self, address: str | None, common: dict[str, Any]) -> None:
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

    def close(self) -> None:
        """Leave the Ray that this session started or joined."""
        if self._connected:
            ray.shutdown()

    def workers(self, part: Placed, *, at_most: int) -> int:
        """How many workers of a stage run at once: no more than it has items, than asked for, than fit now."""
        self._read_resources()
        asked = at_most if part.num_workers == "auto" else part.num_workers
        return max(1, min(at_most, asked, self.nodes.room(part)))

    def _read_resources(self) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.nodes = Nodes([(node.get("CPU", 0), node.get("GPU", 0)) for node in alive])

    def _await_resources(self) -> None:
        deadline = time.monotonic() + self.recipe.cluster.wait_s
        asked = False
        while problems := misfits(self.recipe, self.nodes):
            left = deadline - time.monotonic()
            if left <= 0 or not _has_autoscaler():
                raise InputError(problems)
            parts = {problem.key.split(".")[0] for problem in problems}
            bundles = [bundle for part in sorted(parts) for bundle in _bundles(getattr(self.recipe, part))]
            request_resources(bundles=bundles)
            asked = True
            self.progress.say(f"waiting up to {left:.0f} s for the autoscaler: {problems[0]}")
            time.sleep(min(5.0, max(0.1, left)))
            self._read_resources()
        if asked:
            request_resources(bundles=[])  # from here on the work itself asks, and idle nodes may go


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
        by_cpu = node[0] // part.threads
        return int(min(by_cpu, node[1] // part.gpus_per_worker) if part.gpus_per_worker else by_cpu)


def cluster_address(recipe: Recipe) -> str | None:
    """The cluster to join: the recipe's, or that of the job we run in. None where Ray is to be started here."""
    return recipe.cluster.address or os.environ.get("RAY_ADDRESS") or None


def check_local_resources(recipe: Recipe) -> None:
    """Raises InputError where Ray is to be started here and a stage asks for more than this machine has."""
    if cluster_address(recipe) is None and (problems := misfits(recipe, Nodes([local_resources()]))):
        raise InputError(problems)


def local_resources() -> tuple[int, int]:
    """CPUs and GPUs that this process may use."""
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(get_num_cpus())), torch.cuda.device_count()


def misfits(recipe: Recipe, nodes: Nodes) -> list[Problem]:
    """Why stages do not fit on the nodes; empty where all do."""
    problems = []
    for stage in STAGES:
        part: Placed = getattr(recipe, stage)
        num = _fewest(part)
        room = nodes.room(part)
        if room >= num:
            continue
        alone = room == 0 and part.gpus_per_worker > 0
        asked = "num_workers" if part.num_workers != "auto" else "workers_per_base"
        key, value = ("gpus_per_worker", part.gpus_per_worker) if alone else (asked, num)
        if room == 0 and not alone:
            key, value = "threads", part.threads
        each = f"{part.threads} CPU(s) and {part.gpus_per_worker:g} GPU(s)"
        remedy = f"{num} worker(s) of {each} each ask for more than the cluster has, {nodes}; lower it, or give "
        problems.append(Problem(f"{stage}.{key}", value, remedy + "cluster.address of a larger cluster"))
    return problems


def _bundles(part: Placed) -> list[dict[str, float]]:
    return [{"CPU": part.threads, "GPU": part.gpus_per_worker}] * _fewest(part)


def _fewest(part: Placed) -> int:
    """How many workers of a stage have to fit at once."""
    if part.num_workers != "auto":
        return part.num_workers
    return part.workers_per_base if isinstance(part, Pool) else 1


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port, which Ray itself would go on trying for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _has_autoscaler() -> bool:
    """Whether something may bring nodes. Ray has no public call for it: the monitor's status names the node types
    of a configured autoscaler, and plain nodes each by an id of their own."""
    status = _internal_kv_get(b"__autoscaling_status")
    if not status:
        return False
    report = json.loads(status).get("autoscaler_report") or {}
    types = {kind for mapping in (report.get("node_type_mapping") or {}).values() for kind in [mapping]}
    return any(not str(kind).startswith("node_") for kind in types)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """ray.init puts its own handler on SIGTERM, which would end a stopped job without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _quieten() -> None:
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
