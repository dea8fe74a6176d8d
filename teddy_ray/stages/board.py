"""Where workers post their progress and the driver reads it; metrics and logs of the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.progress import Bar

MIN_INTERVAL_S = 1.0
READ_S = 10.0
STAGE = ("stage",)
"""The tag of every metric."""

log = logging.getLogger("teddy_ray")


class Post(NamedTuple):
    """What a worker said last about an item."""

    share: float
    note: str
    measures: Mapping[str, float]


def measures_of(posts: Mapping[str, Post]) -> dict[str, float]:
    """What items measured: those of a name that ends in _per_s summed, all others averaged over who posted them."""
    values: dict[str, list[float]] = {}
    for post in posts.values():
        for name, value in post.measures.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) if name.endswith("_per_s") else sum(each) / len(each) for name, each in values.items()}


def summarise(posts: Mapping[str, Post]) -> tuple[float, str]:
    """The shares of all items, summed, and a note: of what they measured if they did, else the note that came last."""
    share = sum(post.share for post in posts.values())
    if measures := measures_of(posts):
        return share, ", ".join(_text(name, value) for name, value in measures.items())
    return share, next((f"{item}: {post.note}" for item, post in reversed(list(posts.items())) if post.note), "")


def _text(name: str, value: float) -> str:
    """images_steps_per_s -> 812 images·steps/s; cross_entropy -> cross-entropy 0.451"""
    if name.endswith("_per_s"):
        return f"{_three_digits(value)} {name.removesuffix('_per_s').replace('_', '·')}/s"
    return f"{name.replace('_', '-')} {_three_digits(value)}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


class _Posts:
    """The actor. Keeps one post per item, and of items that no longer run only until the next look.

    It tells Ray's metrics, too, so that they come from one process, on the driver's node.
    """

    def __init__(self) -> None:
        self._posts: dict[str, Post] = {}  # latest last
        self._shares: dict[str, float] = {}  # of items that are not done, those included whose worker was lost
        self._gauges: dict[str, Gauge] = {}
        self._done = Counter("teddy_items_done", "Items finished: trainings, chunks, units, files, students.", STAGE)
        self._lost = Counter("teddy_items_lost", "Items lost with their workers, to be done again.", STAGE)
        self._repeated = Counter("teddy_items_repeated", "Work done again after losses, in items.", STAGE)

    def post(self, stage: str, item: str, post: Post) -> None:
        if post.share < (before := self._shares.get(item, 0.0)):
            self._repeated.inc(before - post.share, {"stage": stage})
        self._shares[item] = post.share
        self._posts.pop(item, None)
        self._posts[item] = post

    def done(self, stage: str, item: str) -> None:
        self._done.inc(1, {"stage": stage})
        self._shares.pop(item, None)
        if item in self._posts:
            self._posts[item] = Post(1.0, "", {})

    def lost(self, stage: str, num: int) -> None:
        if num:
            self._lost.inc(num, {"stage": stage})

    def read(self, stage: str, running: Iterable[str]) -> tuple[float, str]:
        names = set(running)
        self._posts = {item: post for item, post in self._posts.items() if item in names}
        measures = measures_of(self._posts)
        for name in measures.keys() - self._gauges.keys():
            self._gauges[name] = Gauge(f"teddy_{name}", "As the progress shows it; 0 where nothing runs.", STAGE)
        for name, gauge in self._gauges.items():
            gauge.set(measures.get(name, 0.0), {"stage": stage})
        return summarise(self._posts)


class Board:
    """The driver's side. Lives on the driver's own node, so that no other node's death takes it."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(_Posts).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()

    def read(self, stage: str, running: Collection[str]) -> tuple[float, str]:
        """The shares done of the items that run, summed, and a note on them. All other items are forgotten."""
        try:
            share, note = ray.get(self.actor.read.remote(stage, running), timeout=READ_S)
        except RayError:  # what a person sees is not worth the run
            return 0.0, ""
        return share, note

    def lost(self, stage: str, num: int = 1) -> None:
        """Items went with their workers and are done again."""
        self.actor.lost.remote(stage, num)

    def shown_on(self, bar: Bar, stage: str) -> Callable[[int, Collection[str]], None]:
        """Shows items done and those that run on a bar."""

        def show(num_done: int, running: Collection[str]) -> None:
            share, note = self.read(stage, running)
            bar.update(num_done + share, note)

        return show

    def poster(self, stage: str) -> Poster:
        return Poster(self.actor, stage)


class Poster:
    """A worker's side: picklable, posts at most once per interval, never waits, and logs what begins and ends."""

    def __init__(self, actor: Any, stage: str) -> None:
        self._actor, self._stage, self._last = actor, stage, 0.0

    def begin(self, item: str, share: float = 0.0, note: str = "") -> None:
        """An item begins, or goes on where a lost worker's checkpoint stood."""
        log.info("goes on" if share else "begins", extra={"stage": self._stage, "item": item, "share": share})
        self._actor.post.remote(self._stage, item, Post(share, note, {}))

    def __call__(self, item: str, share: float, note: str = "", **measures: float) -> None:
        """measures: shown of all items together, those of a name that ends in _per_s as a sum, others as a mean."""
        if time.monotonic() - self._last >= MIN_INTERVAL_S:
            self._last = time.monotonic()
            self._actor.post.remote(self._stage, item, Post(share, note, measures))

    def done(self, item: str, seconds: float) -> None:
        """An item is published."""
        log.info("done", extra={"stage": self._stage, "item": item, "seconds": round(seconds, 3)})
        self._actor.done.remote(self._stage, item)
