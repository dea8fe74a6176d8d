"""Hands items to actors as they become free; does again what was lost with its worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from teddy_ray.errors import InputError, StageError
from teddy_ray.progress import Bar
from teddy_ray.stages.board import Board

MAX_ATTEMPTS = 5
POLL_S = 0.5


class Item(Protocol):
    """Anything with a name that is its own."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Item)


def result_of(reference: ray.ObjectRef[Any], stage: str, item: str) -> Any:
    """The result of a task. An error of the work itself comes as InputError or StageError, never as Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise own_error(error, stage, item) from None


def own_error(error: BaseException, stage: str, item: str) -> InputError | StageError:
    """What went wrong in a worker, told from how Ray wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError | StageError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return StageError(stage, item, str(error))


@dataclass
class Dispatcher(Generic[T]):
    """Runs items on at most `num_workers` actors and yields (item, result) as they finish.

    start_worker: makes an actor. submit: hands it an item, gives the reference of its result.
    exclusive: a key that no two running items may share, such as the classes of a unit.
    An error of the item's own ends the dispatch; an item lost with its worker is done again, MAX_ATTEMPTS at most.
    Memory is that of the items under way and a few put off, however many there are.
    """

    stage: str
    start_worker: Callable[[], Any]
    submit: Callable[[Any, T], ray.ObjectRef[Any]]
    num_workers: int
    exclusive: Callable[[T], Hashable] = lambda item: item.name
    _running: dict[ray.ObjectRef[Any], tuple[Any, T]] = field(init=False, default_factory=dict)
    _idle: list[Any] = field(init=False, default_factory=list)
    _put_off: deque[T] = field(init=False, default_factory=deque)
    _attempts: dict[str, int] = field(init=False, default_factory=dict)

    def run(self, items: Iterable[T], bar: Bar, board: Board) -> Iterator[tuple[T, Any]]:
        source = iter(items)
        num_done = 0
        try:
            while True:
                while self._num_workers_free() and (item := self._next(source)) is not None:
                    worker = self._idle.pop() if self._idle else self.start_worker()
                    self._running[self.submit(worker, item)] = worker, item
                if not self._running:
                    return
                while self._idle:  # there is nothing to hand out: what they hold may be what another one waits for
                    ray.kill(self._idle.pop())
                done, _ = ray.wait(list(self._running), timeout=POLL_S)
                for reference in done:
                    worker, item = self._running.pop(reference)
                    try:
                        result = result_of(reference, self.stage, item.name)
                    except RayActorError as error:
                        self._retry(item, error)
                        ray.kill(worker)  # unreachable is not dead
                        continue
                    self._idle.append(worker)
                    self._attempts.pop(item.name, None)
                    num_done += 1
                    yield item, result
                share, note = board.read([item.name for _, item in self._running.values()])
                bar.update(num_done + share, note)
        finally:
            for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
                ray.kill(worker)

    def _num_workers_free(self) -> int:
        return self.num_workers - len(self._running)

    def _next(self, source: Iterator[T]) -> T | None:
        """The first item whose exclusive key is free, looking ahead no further than a few items per worker."""
        busy = {self.exclusive(item) for _, item in self._running.values()}
        for index, item in enumerate(self._put_off):
            if self.exclusive(item) not in busy:
                del self._put_off[index]
                return item
        while len(self._put_off) < 4 * self.num_workers and (fresh := next(source, None)) is not None:
            if self.exclusive(fresh) not in busy:
                return fresh
            self._put_off.append(fresh)
        return None

    def _retry(self, item: T, error: RayActorError) -> None:
        attempts = self._attempts.get(item.name, 1)
        if error.actor_init_failed:
            raise StageError(self.stage, item.name, f"its worker could not be set up: {error}")
        if attempts == MAX_ATTEMPTS:
            raise StageError(self.stage, item.name, f"lost with its worker {attempts} times; the last time: {error}")
        self._attempts[item.name] = attempts + 1
        self._put_off.appendleft(item)
