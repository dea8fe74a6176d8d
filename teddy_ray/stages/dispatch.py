"""Which item is handed to which worker, and what is done about a lost one. Knows workers only by an `Executor`."""

from __future__ import annotations

import heapq
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


class Item(Protocol):
    """Anything with a name that is its own."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Item)
T_contra = TypeVar("T_contra", bound=Item, contravariant=True)


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
    """The worker went, and the item with it: it died, ran out of memory, or never came up."""

    reason: str
    why: Literal["worker", "memory", "setup"] = "worker"


Outcome = Done | Failed | Lost


class Executor(Protocol[T_contra]):
    """Where workers live. Each has a number and one item at a time."""

    def start(self) -> int:
        """A new worker. Need not be up yet."""

    def submit(self, worker: int, item: T_contra) -> None:
        """Give an item to a worker that has none."""

    def wait(self, timeout_s: float) -> Iterable[tuple[int, Outcome]]:
        """The items that have ended since the last call, by worker. Waits for the first of them."""

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does."""


def own_error(error: BaseException, stage: str, item: str) -> InputError | StageError:
    """What went wrong in a worker, told from how Ray wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        wrapped = getattr(
            cause, "cause", None
        )  # Ray's error has the type of what it wraps, and a traceback as its text
        if wrapped is None and isinstance(cause, InputError | StageError):
            return cause
        cause = wrapped or cause.__cause__
    return StageError(stage, item, str(error))


@dataclass
class Dispatcher(Generic[T]):
    """Runs items on at most `num_workers` workers and yields (item, result) as they finish.

    exclusive: a key that no two running items may share, such as the classes of a unit.
    memory_remedy: what to do, as an imperative, where an item needs more memory than there is.
    An error of the item's own ends the dispatch; an item lost with its worker is done again, MAX_ATTEMPTS at most.
    Memory is that of the items under way and a few put off, however many there are: nothing is handed out while
    results are not taken.
    """

    stage: str
    executor: Executor[T]
    num_workers: int
    exclusive: Callable[[T], Hashable] = lambda item: item.name
    memory_remedy: str = "give each worker more memory"
    clock: Callable[[], float] = time.monotonic

    def run(
        self, items: Iterable[T], report: Callable[[int, list[str]], None] = lambda num_done, running: None
    ) -> Iterator[tuple[T, Any]]:
        """report: told now and then how many items are done and the names of those that run."""
        queue = _Queue(items, self.exclusive, look_ahead=LOOK_AHEAD * self.num_workers)
        running: dict[int, _Task[T]] = {}
        idle: dict[int, _Rest] = {}
        num_done, reported = 0, self.clock()
        try:
            while True:
                while len(running) < self.num_workers:
                    last = next(reversed(idle), None)
                    if (task := queue.take(after=None if last is None else idle[last].key)) is None:
                        break
                    worker = self.executor.start() if last is None else last
                    running[worker] = task
                    idle.pop(worker, None)
                    self.executor.submit(worker, task.item)
                # there is nothing for those left over: what they hold may be what another one waits for
                patience_s = IDLE_S if queue.num_put_off else 0.0
                for worker in [worker for worker, rest in idle.items() if self.clock() - rest.since >= patience_s]:
                    self.executor.stop(worker)
                    del idle[worker]
                if not running:
                    return
                finished = []
                for worker, outcome in self.executor.wait(POLL_S):
                    task = running[worker]
                    if isinstance(outcome, Done):
                        queue.release(task)
                        idle[worker] = _Rest(task.key, self.clock())
                        finished.append((task.item, outcome.result))
                    else:
                        self._check_worth_another(task, outcome)
                        queue.put_back(task)
                        self.executor.stop(worker)  # unreachable is not dead
                    del running[worker]
                num_done += len(finished)
                if self.clock() - reported >= POLL_S:
                    reported = self.clock()
                    report(num_done, [task.item.name for task in running.values()])
                yield from finished
        finally:
            for worker in {*idle, *running}:
                self.executor.stop(worker)

    def _check_worth_another(self, task: _Task[T], outcome: Failed | Lost) -> None:
        """Raises the error that ends the dispatch, where doing the item again would not help."""
        name = task.item.name
        if isinstance(outcome, Failed):
            raise own_error(outcome.error, self.stage, name) from None
        if outcome.why == "memory":
            raise StageError(self.stage, name, f"out of memory; {self.memory_remedy} ({outcome.reason})")
        if outcome.why == "setup":
            raise StageError(self.stage, name, f"its worker could not be set up: {outcome.reason}")
        if task.attempts >= MAX_ATTEMPTS:
            reason = f"lost with its worker {MAX_ATTEMPTS} times; the last time: {outcome.reason}"
            raise StageError(self.stage, name, reason)


@dataclass(order=True, slots=True)
class _Task(Generic[T]):
    position: int
    item: T = field(compare=False)
    key: Hashable = field(compare=False)
    attempts: int = field(compare=False, default=0)


class _Rest(NamedTuple):
    """A worker without an item: the key that it had last, and since when it has none."""

    key: Hashable
    since: float


class _Queue(Generic[T]):
    """The items not handed out yet, the oldest first among those whose key is free.

    A key is taken from when an item of it is handed out until none of it waits: the next in line inherits it.
    Ready ones come before fresh ones, so that keys advance at one pace and few items are put off.
    """

    def __init__(self, items: Iterable[T], key: Callable[[T], Hashable], *, look_ahead: int) -> None:
        self._source, self._key, self._look_ahead = enumerate(items), key, look_ahead
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
        while self.num_put_off < self._look_ahead and (fresh := next(self._source, None)) is not None:
            task = _Task(*fresh, self._key(fresh[1]))
            if task.key not in self._put_off:
                self._put_off[task.key] = deque()
                return task
            self._put_off[task.key].append(task)
            self.num_put_off += 1
        return None
