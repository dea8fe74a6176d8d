"""Workers that are Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic

import ray
import torch
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from teddy_ray.stages.dispatch import Done, Failed, Lost, Outcome, T, Up, own_error


def result_of(reference: ray.ObjectRef[Any], stage: str, item: str) -> Any:
    """The result of a task. An error of the work itself comes as InputError or StageError, never as Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise own_error(error, stage, item) from None


@dataclass
class RayExecutor(Generic[T]):
    """make: starts an actor. call: hands it an item, gives the reference of its result."""

    make: Callable[[], Any]
    call: Callable[[Any, T], ray.ObjectRef[Any]]
    _numbers: Iterator[int] = field(init=False, default_factory=count)
    _actors: dict[int, Any] = field(init=False, default_factory=dict)
    _starting: set[int] = field(init=False, default_factory=set)
    _calls: dict[ray.ObjectRef[Any], int] = field(init=False, default_factory=dict)

    def start(self) -> int:
        worker = next(self._numbers)
        actor = self._actors[worker] = self.make()
        self._starting.add(worker)
        self._calls[actor.__ray_ready__.remote()] = worker
        return worker

    def submit(self, worker: int, item: T) -> None:
        self._calls[self.call(self._actors[worker], item)] = worker

    def wait(self, timeout_s: float) -> Iterator[tuple[int, Outcome]]:
        references = list(self._calls)
        if not ray.wait(references, timeout=timeout_s)[0]:
            return
        # and all others that are done by now: looking at 512 references costs 0.3 ms each time
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            worker, outcome = self._calls.pop(reference), outcome_of(reference)
            if worker in self._starting:
                self._starting.remove(worker)
                outcome = Up() if isinstance(outcome, Done) else outcome
            yield worker, outcome

    def stop(self, worker: int) -> None:
        self._starting.discard(worker)
        self._calls = {reference: other for reference, other in self._calls.items() if other != worker}
        if worker in self._actors:  # an interrupt may have come between a stop and the note of it
            ray.kill(self._actors.pop(worker))


def outcome_of(reference: ray.ObjectRef[Any]) -> Outcome:
    """How a call of an actor ended."""
    try:
        return Done(ray.get(reference))
    except OutOfMemoryError as error:  # Ray's memory monitor took the worker; not a RayActorError
        return Lost("; ".join(str(error).splitlines()[:2]), why="memory")
    except RayActorError as error:
        return Lost(str(error), why="setup" if error.actor_init_failed else "worker")
    except RayTaskError as error:
        if isinstance(error.cause, torch.AcceleratorError):  # its device is of no use any more
            return Lost(str(error.cause))
        if isinstance(error.cause, MemoryError | torch.OutOfMemoryError):
            return Lost(str(error.cause), why="memory")
        return Failed(error)
    except ActorUnschedulableError as error:
        return Failed(error)
    except RayError as error:  # such as an object lost with its node, or a runtime environment that did not arrive
        return Lost(str(error))
