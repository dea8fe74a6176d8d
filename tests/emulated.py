"""A cluster of several nodes on this machine: real Ray, each node a raylet of its own that can be killed or added."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""A node that was killed counts as dead after three seconds, not after half a minute."""

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}


class EmulatedCluster:
    """A head without CPUs, as a cluster for long work has it, and nodes of one CPU each. Nodes are known by number.

    In a process of its own: one that has started a head does not outlive it, whatever Ray it has joined besides.
    """

    def __init__(self, num_nodes: int = 3) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        facts = self._ask("start")
        self.address: str = facts["address"]
        self.metrics_port: int = facts["metrics_port"]
        self.nodes: list[int] = [self._ask("add")["node"] for _ in range(num_nodes)]
        self._ask("wait")

    def kill(self, node: int) -> None:
        """SIGKILL to all of a node's own processes, at once; its workers end with it."""
        self.nodes.remove(node)
        self._ask("kill", node)

    def add(self) -> int:
        """One more node; does not wait until it has joined."""
        self.nodes.append(self._ask("add")["node"])
        return self.nodes[-1]

    def kill_head(self) -> None:
        self._ask("kill head")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, what: str, node: int = -1) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"what": what, "node": node}), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise AssertionError(f"the emulated cluster ended at {what!r}")


ANSWER = "answer "


def serve() -> None:
    """The cluster's side: does what it is asked on standard input, until that ends."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 150_000_000, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": HEALTH})
    nodes: dict[int, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["what"] == "start":
            answer = {"address": cluster.address, "metrics_port": cluster.head_node.metrics_export_port}
        elif request["what"] == "add":
            answer["node"] = len(nodes)
            nodes[len(nodes)] = cluster.add_node(wait=False, **NODE)
        elif request["what"] == "wait":
            cluster.wait_for_nodes(timeout=120)
        elif request["what"] == "kill":
            cluster.remove_node(nodes[request["node"]], allow_graceful=False)
        else:
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        print(ANSWER + json.dumps(answer), flush=True)
    for node in [*cluster.worker_nodes, cluster.head_node]:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


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


if __name__ == "__main__":
    serve()
