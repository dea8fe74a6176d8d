"""A cluster of several nodes on this machine: real Ray, each node a raylet of its own that can be killed or added."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _initialize_internal_kv, _internal_kv_reset

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""A node that was killed counts as dead after three seconds, not after half a minute."""

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}


class EmulatedCluster:
    """A head without CPUs, as a cluster for long work has it, and nodes of one CPU each."""

    def __init__(self, num_nodes: int = 3) -> None:
        head = {"num_cpus": 0, "object_store_memory": 150_000_000, "dashboard_host": "127.0.0.1"}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": HEALTH})
        self.address: str = self._cluster.address
        self.head: Node = self._cluster.head_node
        self.nodes: list[Node] = [self._cluster.add_node(wait=False, **NODE) for _ in range(num_nodes)]
        self._cluster.wait_for_nodes(timeout=120)
        _own_key_value_store()

    def kill(self, node: Node) -> None:
        """SIGKILL to all of a node's own processes, at once; its workers end with it."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def add(self) -> Node:
        """One more node; does not wait until it has joined. From the main thread only."""
        self.nodes.append(self._cluster.add_node(wait=False, **NODE))
        return self.nodes[-1]

    def close(self) -> None:
        """Ends its processes. Another Ray of this process would not outlive the cluster's own shutdown."""
        for node in [*self.nodes, self.head]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _own_key_value_store() -> None:
    """A head that starts makes its store that of this process, whatever Ray the process has joined."""
    _internal_kv_reset()
    if ray.is_initialized():
        _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


class Driver:
    """A program of ours in a process of its own, with its lines as they come."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=Path(__file__).parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 300) -> None:
        """Until the condition holds. Fails where the program ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"not in {timeout_s} s:\n{self.text}"
            time.sleep(0.02)

    def follow(self, look: Callable[[], None], timeout_s: float = 600) -> int:
        """Its exit status. Looks all the time until then."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            look()
            time.sleep(0.02)
        return self.finish(timeout_s=10)

    def finish(self, timeout_s: float = 600) -> int:
        """Its exit status. Kills it where it takes longer."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not in {timeout_s} s:\n{self.text}") from None
        self._reader.join(timeout=10)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)


@contextlib.contextmanager
def driver(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Driver]:
    """A driver that does not outlive the block."""
    program = Driver(*arguments, env=env)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.kill()
