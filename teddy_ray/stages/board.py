"""Where workers post their progress and the driver reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.progress import Bar

MIN_INTERVAL_S = 1.0


class Post(NamedTuple):
    """What a worker said last about an item."""

    share: float
    note: str
    measures: Mapping[str, float]


def summarise(posts: Mapping[str, Post]) -> tuple[float, str]:
    """The shares of all items, summed, and a note: of what they measured if they did, else the note that came last.

    Measures whose name ends in _per_s are summed, all others averaged over the items that posted them.
    """
    share = sum(post.share for post in posts.values())
    values: dict[str, list[float]] = {}
    for post in posts.values():
        for name, value in post.measures.items():
            values.setdefault(name, []).append(value)
    if values:
        return share, ", ".join(_text(name, each) for name, each in values.items())
    return share, next((f"{item}: {post.note}" for item, post in reversed(list(posts.items())) if post.note), "")


def _text(name: str, values: list[float]) -> str:
    """images_steps_per_s -> 812 images·steps/s; cross_entropy -> cross-entropy 0.451"""
    if name.endswith("_per_s"):
        return f"{_three_digits(sum(values))} {name.removesuffix('_per_s').replace('_', '·')}/s"
    return f"{name.replace('_', '-')} {_three_digits(sum(values) / len(values))}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


class _Posts:
    """The actor. Keeps one post per item, and of items that no longer run only until the next look."""

    def __init__(self) -> None:
        self._posts: dict[str, Post] = {}  # latest last

    def post(self, item: str, post: Post) -> None:
        self._posts.pop(item, None)
        self._posts[item] = post

    def read(self, running: Iterable[str]) -> tuple[float, str]:
        names = set(running)
        self._posts = {item: post for item, post in self._posts.items() if item in names}
        return summarise(self._posts)


class Board:
    """The driver's side. Lives on the driver's own node, so that no other node's death takes it."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(_Posts).options(num_cpus=0, scheduling_strategy=here).remote()

    def read(self, running: Collection[str]) -> tuple[float, str]:
        """The shares done of the items that run, summed, and a note on them. All other items are forgotten."""
        share, note = ray.get(self.actor.read.remote(running))
        return share, note

    def shown_on(self, bar: Bar) -> Callable[[int, Collection[str]], None]:
        """Shows items done and those that run on a bar."""

        def show(num_done: int, running: Collection[str]) -> None:
            share, note = self.read(running)
            bar.update(num_done + share, note)

        return show

    def poster(self) -> Poster:
        return Poster(self.actor)


class Poster:
    """A worker's side: picklable, posts at most once per interval, and never waits."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._last = actor, 0.0

    def __call__(self, item: str, share: float, note: str = "", **measures: float) -> None:
        """measures: shown of all items together, those of a name that ends in _per_s as a sum, others as a mean."""
        if time.monotonic() - self._last >= MIN_INTERVAL_S:
            self._last = time.monotonic()
            self._actor.post.remote(item, Post(share, note, measures))
