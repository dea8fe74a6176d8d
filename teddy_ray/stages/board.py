"""Where workers post their progress and the driver reads it."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIN_INTERVAL_S = 1.0


class _Counts:
    def __init__(self) -> None:
        self._posts: dict[str, tuple[float, str]] = {}  # latest last

    def post(self, item: str, share: float, note: str) -> None:
        self._posts.pop(item, None)
        self._posts[item] = share, f"{item}: {note}"

    def read(self, running: list[str]) -> tuple[float, str]:
        self._posts = {item: post for item, post in self._posts.items() if item in running}
        notes = [note for _, note in self._posts.values()] or [""]
        return sum(share for share, _ in self._posts.values()), notes[-1]


class Board:
    """The driver's side. Lives on the driver's own node, so that no other node's death takes it."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(_Counts).options(num_cpus=0, scheduling_strategy=here).remote()

    def read(self, running: list[str]) -> tuple[float, str]:
        """The shares done of the items that run, summed, and the latest note. All other items are forgotten."""
        share, note = ray.get(self.actor.read.remote(running))
        return share, note

    def poster(self) -> Poster:
        return Poster(self.actor)


class Poster:
    """A worker's side: picklable, posts at most once per interval, and never waits."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._last = actor, 0.0

    def __call__(self, item: str, share: float, note: str) -> None:
        if time.monotonic() - self._last >= MIN_INTERVAL_S:
            self._last = time.monotonic()
            self._actor.post.remote(item, share, note)
