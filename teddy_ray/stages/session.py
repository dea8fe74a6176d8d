"""What every stage is given, and the Ray it runs on: started or joined when the first stage needs it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import ray
from ray._private.utils import get_num_cpus  # knows the CPU quota of a container
from ray.exceptions import RayError

from teddy_ray.errors import InputError, Problem
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.recipe import Placed, Recipe
from teddy_ray.sources import Source
from teddy_ray.stages import autoscaler
from teddy_ray.stages.board import Board
from teddy_ray.stages.claims import Alone, Claims
from teddy_ray.stages.nodes import Nodes, bundles, fewest, misfits
from teddy_ray.stages.quiet import without_raylets
from teddy_ray.stages.reach import check_reach
from teddy_ray.storage import Storage

CONNECT_TIMEOUT_S = 5.0

NODES_EVERY_S = 2.0
"""How often the cluster is asked for its nodes."""

TELL_EVERY_S = 30.0
ASK_EVERY_S = 60.0

HOPELESS_S = 11.0
"""An autoscaler that does nothing for so long, more than twice its own interval, has nothing that would help."""


class Probes(Protocol):
    """Takes accuracies of a student that is not finished; picklable."""

    @property
    def epochs(self) -> Collection[int]: ...

    def __call__(self, epoch: int, accuracy: float) -> None: ...


@dataclass
class Session:
    """One run of a plan. `board` is where workers post their progress.

    claims: of what this run makes and others need, too. probes: who is told how the first student gets on.
    at_work: how many runs share the cluster's workers now, this one included; None where it is alone. One of several
    asks no autoscaler for nodes, for it would take back what another had asked for; and its workers do not wait for
    each other, which might be for ever.
    """

    plan: Plan
    source: Source
    storage: Storage
    progress: Progress
    claims: Claims = field(default_factory=Alone)
    probes: Probes | None = None
    at_work: Callable[[], int] | None = None
    nodes: Nodes = field(init=False)
    _node_ids: set[str] = field(init=False, default_factory=set)
    _read_at: float = field(init=False, default=-math.inf)
    _told_at: float = field(init=False, default=-math.inf)
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
        if self.recipe.logs.form == "json":
            common["logging_config"] = ray.LoggingConfig(encoding="JSON", log_level="INFO")
        address = cluster_address(self.recipe)
        with _signals_kept(), _root_logger_kept():
            self._connect(address, common)
        _quieten()
        self._read_resources()
        if address is not None:
            if autoscaler.exists():
                autoscaler.ask([])  # what a driver that was killed had asked for stays until somebody takes it back
            self._await_resources()
            self.progress.say(f"joined the Ray cluster at {address} ({self.nodes})")
            check_reach(self.storage, self.source_ref)

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
        if time.monotonic() - self._read_at > NODES_EVERY_S:
            self._read_resources()
        room = self.nodes.room(part)
        if not room and time.monotonic() - self._told_at > TELL_EVERY_S:
            self._told_at = time.monotonic()
            self.progress.say(f"waiting for a node: none has room for {bundles(part, 1)[0]}")
        if self.at_work is not None:
            room = -(-room // max(1, self.at_work()))
        return max(1, min(_wanted(part, at_most), room))

    @contextlib.contextmanager
    def hiring(self, part: Placed, *, at_most: int) -> Iterator[Hiring]:
        """`workers`, to be asked as nodes come and go. An autoscaler is asked for as many as the stage can use."""
        hiring = Hiring(self, part, at_most, self.at_work is None and autoscaler.exists())
        hiring()
        try:
            yield hiring
        finally:
            if hiring.scales:
                with contextlib.suppress(RayError, ConnectionError):  # the cluster may be what has gone
                    autoscaler.ask([])

    def _read_resources(self) -> None:
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self.nodes = Nodes([(node.get("CPU", 0), node.get("GPU", 0)) for node in alive.values()])
        self._read_at = time.monotonic()
        lost, joined = self._node_ids - alive.keys(), alive.keys() - self._node_ids
        if self._node_ids and (lost or joined):
            text = f"{len(lost)} node(s) lost, {len(joined)} joined: the cluster now has {self.nodes}"
            self.progress.say(text, lost=sorted(lost), joined=sorted(joined))
        self._node_ids = set(alive)

    def _await_resources(self) -> None:
        started = at_it = time.monotonic()
        told = -math.inf
        asked = None
        while problems := misfits(self.recipe, self.nodes):
            now = time.monotonic()
            left = started + self.recipe.cluster.wait_s - now
            if left <= 0 or not autoscaler.exists() or now - at_it > HOPELESS_S:
                if asked:
                    autoscaler.ask([])
                raise InputError(problems)
            stage = problems[0].key.split(".")[0]
            if stage != asked:  # one after another, for the stages never run at the same time
                part = getattr(self.recipe, stage)
                autoscaler.ask(bundles(part, fewest(part)))
                asked = stage
            if autoscaler.is_at_it():
                at_it = now
            if now - told >= TELL_EVERY_S:
                told = now
                self.progress.say(f"waiting up to {left:.0f} s for the autoscaler: {problems[0]}")
            time.sleep(min(2.0, max(0.1, left)))
            self._read_resources()
        if asked:
            autoscaler.ask([])  # from here on each stage asks for what it can use


@dataclass
class Hiring:
    """How many workers of a stage to have, asked anew all the time. at_most: items left, to be lowered as they end."""

    session: Session
    part: Placed
    at_most: int
    scales: bool
    _asked: tuple[int, float] = (0, -math.inf)

    def __call__(self) -> int:
        wanted = _wanted(self.part, max(1, self.at_most))
        # again now and then: another run on the cluster may have asked for something else since
        if self.scales and (wanted != self._asked[0] or time.monotonic() - self._asked[1] > ASK_EVERY_S):
            self._asked = wanted, time.monotonic()
            autoscaler.ask(bundles(self.part, wanted))
        return self.session.workers(self.part, at_most=max(1, self.at_most))


def _wanted(part: Placed, at_most: int) -> int:
    return at_most if part.num_workers == "auto" else min(at_most, part.num_workers)


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


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port, which Ray itself would go on trying for minutes."""
    host, separator, port = address.rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """ray.init puts its own handler on SIGTERM, which would end a stopped job without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """A logging_config is meant for workers; ray.init makes the driver's libraries speak up, too."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _quieten() -> None:
    without_raylets()
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it reports every lost worker with a traceback
