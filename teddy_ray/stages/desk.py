"""Where workers of the pool take trainings from. Imports no torch: its actor lives long and does little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.pool_plan import Training

if TYPE_CHECKING:
    from teddy_ray.data_parallel import Group


class _Desk:
    """The actor. Hands out trainings by their position in a list; -1 where none is left."""

    def __init__(self, num: int) -> None:
        self._left = list(range(num))
        self._reserved: dict[str, list[int]] = {}
        self._taken: dict[str, list[int]] = {}

    def reserve(self, taker: str, num: int) -> None:
        self._reserved[taker], self._left = self._left[:num], self._left[num:]
        self._taken[taker] = list(self._reserved[taker])

    def take(self, taker: str) -> int:
        if self._reserved[taker]:
            return self._reserved[taker].pop(0)
        if not self._left or taker not in self._taken:
            return -1
        self._taken[taker].append(position := self._left.pop(0))
        return position

    def put_back(self, taker: str, finished: Sequence[int]) -> None:
        self._reserved[taker] = []  # one that is still at it gets nothing more of its own
        self._left = sorted({*self._left, *self._taken.pop(taker)} - set(finished))

    def num_left(self) -> int:
        return len(self._left)


@dataclass(frozen=True)
class Desk:
    """Where workers take trainings from, so that those of a node that joins late find what is left.

    taker: the run of Ray Train that takes; what it had taken and not finished is put back when it fails.
    """

    actor: Any

    @staticmethod
    def open(num: int) -> Desk:
        """On the driver's own node, so that no other node's death takes it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return Desk(ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here).remote(num))

    def reserve(self, taker: str, num: int) -> None:
        """Keep the first ones that are left for a taker that begins: nobody else is to be sent for them."""
        ray.get(self.actor.reserve.remote(taker, num))

    def trainings(self, taker: str, trainings: Sequence[Training], group: Group) -> Iterator[Training]:
        """One after another, the same for all workers of a group. Every one of them has to call it."""
        while True:
            position = ray.get(self.actor.take.remote(taker)) if group.rank == 0 else 0
            position = round(group.sum_number(position))
            if position < 0:
                return
            yield trainings[position]

    def put_back(self, taker: str, finished: Sequence[int]) -> None:
        ray.get(self.actor.put_back.remote(taker, finished))

    def num_left(self) -> int:
        """Of those that nobody took or keeps."""
        num: int = ray.get(self.actor.num_left.remote())
        return num
