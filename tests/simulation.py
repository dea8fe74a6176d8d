"""A cluster under a clock of its own: the executor with which the dispatcher is tried at full scale."""

from __future__ import annotations

import heapq
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field

from teddy_ray.stages.dispatch import Dispatcher, Done, Lost, Outcome, Up


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of a simulated plan: a group of classes and its size, in seconds of the slowest worker."""

    name: str
    position: int
    group: int
    size_s: float


def blocks(num_groups: int, num_slots: int) -> Iterator[Block]:
    """In the order of a plan: slots outer, groups inner."""
    rng = random.Random("sizes")
    for slot in range(num_slots):
        for group in range(num_groups):
            position = slot * num_groups + group
            size_s = rng.uniform(50, 150)
            yield Block(f"classes {group} slots {slot}", position, group, size_s)


@dataclass
class SimulatedCluster:
    """Workers of 1 to 4 times the speed of the slowest, each up at once; a few items are lost with their worker.

    It knows the whole plan, which the dispatcher does not, and so measures what the dispatcher wasted:

    busy_s: worker-seconds spent on items, those lost included.
    idle_s: the integral of the workers without an item over the time in which an item was neither finished nor
        running. So the end of the run counts from the moment when nothing is left to be handed out: one worker then
        waits for another's last item under any order.
    blocked_s: the part of idle_s in which an item of every group that was left was running, so that nothing could
        have been handed out. The rest of idle_s is the dispatcher's own fault.
    """

    num_workers: int
    num_groups: int
    num_slots: int
    lost_frac: float = 0.01
    now: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    blocked_s: float = 0.0
    num_lost: int = 0
    num_started: int = 0
    finished: bytearray = field(init=False)  # how often, of each block
    submitted: bytearray = field(init=False)
    _left: list[int] = field(init=False)  # of each group: blocks neither finished nor running
    _running: dict[int, Block] = field(init=False, default_factory=dict)
    _groups: set[int] = field(init=False, default_factory=set)
    _ends: list[tuple[float, int, bool]] = field(init=False, default_factory=list)
    _speeds: dict[int, float] = field(init=False, default_factory=dict)
    _starting: list[int] = field(init=False, default_factory=list)
    _rng: random.Random = field(init=False, default_factory=lambda: random.Random("cluster"))

    def __post_init__(self) -> None:
        self.finished, self.submitted = (bytearray(self.num_groups * self.num_slots) for _ in range(2))
        self._left = [self.num_slots] * self.num_groups
        self._num_left = self.num_groups * self.num_slots
        self._num_open = self.num_groups  # groups with blocks left of which none runs

    def start(self) -> int:
        self.num_started += 1
        self._speeds[self.num_started] = self._rng.uniform(1, 4)
        self._starting.append(self.num_started)
        return self.num_started

    def submit(self, worker: int, item: Block) -> None:
        assert worker not in self._running, "one item at a time"
        assert item.group not in self._groups, "two of a group at a time"
        assert len(self._running) < self.num_workers
        self._running[worker] = item
        self._groups.add(item.group)
        self._num_open -= 1
        self._left[item.group] -= 1
        self._num_left -= 1
        self.submitted[item.position] += 1
        seconds = item.size_s / self._speeds[worker]
        lost = self._rng.random() < self.lost_frac
        if lost:
            seconds *= self._rng.random()
        self.busy_s += seconds
        heapq.heappush(self._ends, (self.now + seconds, worker, lost))

    def wait(self, timeout_s: float) -> Iterator[tuple[int, Outcome]]:
        if self._starting:
            yield from [(worker, Up()) for worker in self._starting]
            self._starting.clear()
            return
        end = self._ends[0][0]
        self._advance(min(end, self.now + timeout_s))
        if end > self.now:
            return
        _, worker, lost = heapq.heappop(self._ends)
        block = self._running.pop(worker)
        self._groups.remove(block.group)
        if lost:
            self.num_lost += 1
            self._left[block.group] += 1
            self._num_left += 1
        else:
            self.finished[block.position] += 1
        self._num_open += self._left[block.group] > 0
        yield worker, Lost("simulated") if lost else Done(block.position)

    def stop(self, worker: int) -> None:
        assert worker not in self._running
        del self._speeds[worker]
        if worker in self._starting:
            self._starting.remove(worker)

    def clock(self) -> float:
        return self.now

    def _advance(self, to: float) -> None:
        if self._num_left:
            idle = self.num_workers - len(self._running)
            self.idle_s += idle * (to - self.now)
            self.blocked_s += (idle - min(idle, self._num_open)) * (to - self.now)
        self.now = to


@dataclass(frozen=True)
class Simulated:
    """A finished run. wall_s: real time, that of the simulation included; peak_bytes: of all that the run allocated."""

    cluster: SimulatedCluster
    results: int
    wall_s: float
    peak_bytes: int

    @property
    def idle_frac(self) -> float:
        return self.cluster.idle_s / self.cluster.busy_s


def simulate(num_groups: int, num_slots: int, num_workers: int, *, traced: bool = False) -> Simulated:
    """Dispatch every block. traced: measure the memory too, at eight times the wall time."""
    cluster = SimulatedCluster(num_workers, num_groups, num_slots)
    dispatcher = Dispatcher[Block](
        "simulation", cluster, lambda: num_workers, exclusive=lambda block: block.group, clock=cluster.clock
    )
    if traced:
        tracemalloc.start()
    started = time.perf_counter()
    results = 0
    for block, position in dispatcher.run(blocks(num_groups, num_slots)):
        assert position == block.position
        results += 1
    wall_s = time.perf_counter() - started
    peak_bytes = 0
    if traced:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Simulated(cluster, results, wall_s, peak_bytes)
