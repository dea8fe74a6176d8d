"""The workers of a stage: Ray actors on all nodes, as many as there is room for, that work off its items."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import ray

from teddy_ray.recipe import Placed
from teddy_ray.stages.dispatch import Dispatcher, Lost, T
from teddy_ray.stages.executor import RayExecutor
from teddy_ray.stages.session import Session


def work_off(
    session: Session,
    stage: str,
    part: Placed,
    items: Sequence[T],
    *,
    at_once: int,
    worker: type,
    settings: tuple[Any, ...],
    call: Callable[[Any, T], ray.ObjectRef[None]],
    exclusive: Callable[[T], Hashable] = lambda item: item.name,
    mark: Callable[[T], Hashable] = lambda item: None,
    memory_remedy: str,
    title: str,
    what: str,
) -> None:
    """Have every item done, each by one of the workers.

    part: the stage's part of the recipe, which places workers. at_once: how many items can be done at a time.
    worker, settings: the class of the actors and what it is made of. call: hands a worker an item.
    exclusive, mark, memory_remedy: as the Dispatcher takes them. title, what: of the progress, and what it counts.
    """
    # over all nodes, or Ray would fill the first ones
    actor: Any = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker, scheduling_strategy="SPREAD")(worker)

    def tell(item: T, lost: Lost) -> None:
        session.board.lost(stage)
        text = f"{stage}: lost the worker of {item.name}, which goes on elsewhere"
        session.progress.say(text, stage=stage, item=item.name, reason=lost.reason)

    num_items = len(items)
    with (
        session.hiring(part, at_most=min(at_once, num_items)) as num_workers,
        session.progress.stage(title, num_items, what) as bar,
    ):
        dispatcher = Dispatcher[T](
            stage,
            RayExecutor(lambda: actor.remote(*settings), call),
            num_workers=num_workers,
            exclusive=exclusive,
            mark=mark,
            memory_remedy=memory_remedy,
            on_lost=tell,
        )
        show = session.board.shown_on(bar, stage)
        for num_done, _ in enumerate(dispatcher.run(items, show), start=1):
            num_workers.at_most = min(at_once, num_items - num_done)
        show(num_items, [])
