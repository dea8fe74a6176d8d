"""Which item is handed to which worker, and what is done about a lost one. Knows workers only by an `Executor`."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from teddy_ray.errors import InputError, StageError

MAX_ATTEMPTS = 5
LOOK_AHEAD = 2
"""Items put off, per worker, because one of their exclusive key runs. With more of them fast keys run ahead of slow
ones, and where there are hardly more keys than workers all wait for those in the end."""
IDLE_S = 10.0
"""How long a worker is kept while every item within sight waits for its key: a new one takes its time to start."""
POLL_S = 0.5
TOGETHER_S = 10.0
"""Workers lost within so long as they start are one event, such as the death of a node that was to hold eight."""


class Item(Protocol):
    """Anything with a name that is its own."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Item)
T_contra = TypeVar("T_contra", bound=Item, contravariant=True)


@dataclass(frozen=True)
class Up:
    """A new worker is there and can be given an item."""


@dataclass(frozen=True)
class Done:
    """The item is finished."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """The work itself raised an error."""

    error: BaseException


@dataclass(frozen=True)
class Lost:
    """The worker went, and its item with it: it died, ran out of memory, or could not be set up."""

    reason: str
    why: Literal["worker", "memory", "setup"] = "worker"


Outcome = Up | Done | Failed | Lost


class Executor(Protocol[T_contra]):
    """Where workers live. Each has a number and one item at a time."""

    def start(self) -> int:
        """A new worker. `wait` tells when it is up, which may be never while others hold what it needs."""

    def submit(self, worker: int, item: T_contra) -> None:
        """Give an item to a worker that is up and has none."""

    def wait(self, timeout_s: float) -> Iterable[tuple[int, Outcome]]:
        """What has come of workers that started or had an item, since the last call. Waits for the first of them."""

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does."""


def own_error(error: BaseException, stage: str, item: str) -> InputError | StageError:
    """What went wrong in a worker, told from how Ray wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's error has the type of what it wraps, and a traceback as its text
        wrapped = getattr(cause, "cause", None)
        if wrapped is None and isinstance(cause, InputError | StageError):
            return cause
        cause = wrapped or cause.__cause__
    return StageError(stage, item, str(error))


@dataclass
class Dispatcher(Generic[T]):
    """Runs items on workers and yields (item, result) as they finish.

    num_workers: how many to have at most, asked anew all the time: nodes come and go. A worker gets an item when it is
    up, so that none waits for a worker which may never be placed.
    exclusive: a key that no two running items may share, such as the classes of a unit.
    memory_remedy: what to do, as an imperative, where an item needs more memory than there is.
    on_lost: told of every item that is lost and will be done again, and why.
    mark: how far an item has come, in a form that can be compared, such as a hash of its checkpoint.
    An error of the item's own ends the dispatch; an item lost with its worker is done again, MAX_ATTEMPTS at most
    without getting any further.
    Memory is that of the items under way and a few put off, however many there are: nothing is handed out while
    results are not taken.
    """

    stage: str
    executor: Executor[T]
    num_workers: Callable[[], int]
    exclusive: Callable[[T], Hashable] = lambda item: item.name
    memory_remedy: str = "give each worker more memory"
    on_lost: Callable[[T, Lost], None] = lambda item, lost: None
    mark: Callable[[T], Hashable] = lambda item: None
    clock: Callable[[], float] = time.monotonic

    def run(
        self, items: Iterable[T], report: Callable[[int, list[str]], None] = lambda num_done, running: None
    ) -> Iterator[tuple[T, Any]]:
        """report: told now and then how many items are done and the names of those that run."""
        queue = _Queue(items, self.exclusive)
        crew = _Crew[T]()
        num_done, reported, failures = 0, self.clock(), _FailedStarts()
        try:
            while True:
                self._hand_out(queue, crew)
                if not crew.running and not crew.waiting:
                    return
                finished = []
                for worker, outcome in self.executor.wait(POLL_S):
                    if worker in crew.starting:
                        self._check_start(outcome, failures)
                        crew.starting.remove(worker)
                        if isinstance(outcome, Up):
                            crew.idle[worker] = _Rest(None, self.clock())
                        else:
                            self.executor.stop(worker)
                        continue
                    task = crew.running.pop(worker)
                    if isinstance(outcome, Done):
                        queue.release(task)
                        crew.idle[worker] = _Rest(task.key, self.clock())
                        finished.append((task.item, outcome.result))
                    else:
                        self.executor.stop(worker)  # unreachable is not dead
                        self._check_worth_another(task, outcome)
                        queue.put_back(task)
                num_done += len(finished)
                if self.clock() - reported >= POLL_S:
                    reported = self.clock()
                    report(num_done, [task.item.name for task in crew.running.values()])
                yield from finished
        finally:
            for worker in {*crew.starting, *crew.idle, *crew.running}:
                self.executor.stop(worker)

    def _hand_out(self, queue: _Queue[T], crew: _Crew[T]) -> None:
        """Give every worker that is up an item, start those that more items are there for, let go of the rest."""
        limit = self.num_workers()
        queue.look_ahead = LOOK_AHEAD * limit
        while crew.idle and len(crew.running) < limit:
            worker = next(iter(crew.idle)) if crew.waiting else next(reversed(crew.idle))
            task = crew.waiting.popleft() if crew.waiting else queue.take(after=crew.idle[worker].key)
            if task is None:
                break
            del crew.idle[worker]
            crew.running[worker] = task
            self.executor.submit(worker, task.item)
        while crew.size < limit:
            if len(crew.waiting) <= len(crew.starting):  # a worker is coming for each of them
                if (task := queue.take(after=None)) is None:
                    break
                crew.waiting.append(task)
            crew.starting.append(self.executor.start())
        while crew.starting and crew.size > limit:  # a node has gone, and what would have been placed there
            self.executor.stop(crew.starting.pop())
        # there is nothing for those left over: what they hold may be what another one waits for
        patience_s = IDLE_S if queue.num_put_off else 0.0
        for worker in [worker for worker, rest in crew.idle.items() if self.clock() - rest.since >= patience_s]:
            self.executor.stop(worker)
            del crew.idle[worker]

    def _check_start(self, outcome: Outcome, failures: _FailedStarts) -> None:
        """Raises StageError where a worker did not come up and another would not either."""
        if isinstance(outcome, Up):
            failures.num = 0
            return
        if isinstance(outcome, Failed):
            raise own_error(outcome.error, self.stage, "a worker") from None
        assert isinstance(outcome, Lost)
        if outcome.why == "setup":
            raise StageError(self.stage, "a worker", f"could not be set up: {outcome.reason}")
        if self.clock() - failures.since < TOGETHER_S:
            return
        failures.num, failures.since = failures.num + 1, self.clock()
        if failures.num >= MAX_ATTEMPTS:
            reason = f"{MAX_ATTEMPTS} times in a row they were lost as they started: {outcome.reason}"
            raise StageError(self.stage, "its workers", reason)

    def _check_worth_another(self, task: _Task[T], outcome: Outcome) -> None:
        """Raises the error that ends the dispatch, where doing the item again would not help."""
        name = task.item.name
        if isinstance(outcome, Failed):
            raise own_error(outcome.error, self.stage, name) from None
        assert isinstance(outcome, Lost)
        if outcome.why == "memory":
            raise StageError(self.stage, name, f"out of memory; {self.memory_remedy} ({outcome.reason})")
        if (mark := self.mark(task.item)) != task.mark:
            task.mark, task.attempts = mark, 0
        if task.attempts >= MAX_ATTEMPTS:
            reason = f"lost with its worker {MAX_ATTEMPTS} times; the last time: {outcome.reason}"
            raise StageError(self.stage, name, reason)
        self.on_lost(task.item, outcome)


@dataclass(order=True, slots=True)
class _Task(Generic[T]):
    position: int
    item: T = field(compare=False)
    key: Hashable = field(compare=False)
    attempts: int = field(compare=False, default=0)
    mark: Hashable = field(compare=False, default=None)


class _Rest(NamedTuple):
    """A worker without an item: the key that it had last, None where it is new, and since when it has none."""

    key: Hashable
    since: float


@dataclass
class _FailedStarts:
    """How often in a row workers did not come up, and when the last of those times began."""

    num: int = 0
    since: float = -math.inf


@dataclass
class _Crew(Generic[T]):
    """The workers, each in one of three states, and the items taken for those that are not up yet."""

    starting: list[int] = field(default_factory=list)
    idle: dict[int, _Rest] = field(default_factory=dict)
    running: dict[int, _Task[T]] = field(default_factory=dict)
    waiting: deque[_Task[T]] = field(default_factory=deque)

    @property
    def size(self) -> int:
        return len(self.starting) + len(self.idle) + len(self.running)


class _Queue(Generic[T]):
    """The items not handed out yet, the oldest first among those whose key is free.

    A key is taken from when an item of it is handed out until none of it waits: the next in line inherits it.
    Ready ones come before fresh ones, so that keys advance at one pace and few items are put off.
    """

    def __init__(self, items: Iterable[T], key: Callable[[T], Hashable]) -> None:
        self._source, self._key = enumerate(items), key
        self.look_ahead = 0
        self._ready: list[_Task[T]] = []  # a heap; each holds its key
        self._put_off: dict[Hashable, deque[_Task[T]]] = {}  # for each key that is taken, who waits for it
        self.num_put_off = 0

    def take(self, after: Hashable) -> _Task[T] | None:
        """The next item, None where every one within sight has to wait for its key.

        after: the key that the worker had last. It gets another where there is one, or the slowest worker would keep
        the key that lags behind because of it: at the end all others would wait for it.
        """
        task = self._next()
        if task is not None and task.key == after and (other := self._next()) is not None:
            heapq.heappush(self._ready, task)
            task = other
        if task is not None:
            task.attempts += 1
        return task

    def release(self, task: _Task[T]) -> None:
        """A task taken is finished."""
        if waiting := self._put_off[task.key]:
            heapq.heappush(self._ready, waiting.popleft())
            self.num_put_off -= 1
        else:
            del self._put_off[task.key]

    def put_back(self, task: _Task[T]) -> None:
        """A task taken has to be done again."""
        heapq.heappush(self._ready, task)

    def _next(self) -> _Task[T] | None:
        if self._ready:
            return heapq.heappop(self._ready)
        while self.num_put_off < self.look_ahead and (fresh := next(self._source, None)) is not None:
            task = _Task(*fresh, self._key(fresh[1]))
            if task.key not in self._put_off:
                self._put_off[task.key] = deque()
                return task
            self._put_off[task.key].append(task)
            self.num_put_off += 1
        return None
