"""The dispatcher on simulated workers: every item once, whatever happens to them, at any scale."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import pytest
import ray.exceptions
from simulation import simulate

from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.stages import executor as executors
from teddy_ray.stages.dispatch import (
    IDLE_S,
    LOOK_AHEAD,
    MAX_ATTEMPTS,
    POLL_S,
    TOGETHER_S,
    Dispatcher,
    Done,
    Failed,
    Lost,
    Outcome,
    Up,
)
from teddy_ray.stages.executor import outcome_of


@dataclass(frozen=True)
class Word:
    """An item of work; its first letter is its exclusive key where a test wants one."""

    name: str


class Script:
    """Workers that end their items in the order in which they got them, each as the script says, else well.

    starts: what comes of workers as they start, in their order; without more of it they are up at once. None: never.
    """

    def __init__(self, starts: Sequence[Outcome | None] = (), **script: list[Outcome]) -> None:
        self.script, self.now, self.log = script, 0.0, list[str]()
        self.alive, self.running, self.starting = set[int](), dict[int, Word](), dict[int, Outcome]()
        self._numbers, self._starts, self.start_s = count(1), list(starts), 0.0

    def start(self) -> int:
        worker = next(self._numbers)
        self.alive.add(worker)
        if (outcome := self._starts.pop(0) if self._starts else Up()) is not None:
            self.starting[worker] = outcome
        self.log.append(f"start {worker}")
        return worker

    def submit(self, worker: int, item: Word) -> None:
        assert worker in self.alive - self.running.keys() - self.starting.keys()
        self.running[worker] = item
        self.log.append(f"{worker}: {item.name}")

    def wait(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        if self.starting:
            self.now += self.start_s
            starting, self.starting = self.starting, {}
            return list(starting.items())
        self.now += timeout_s
        worker = next(iter(self.running))
        name = self.running.pop(worker).name
        outcomes = self.script.get(name)
        return [(worker, outcomes.pop(0) if outcomes else Done(name.upper()))]

    def stop(self, worker: int) -> None:
        self.alive.remove(worker)
        self.running.pop(worker, None)
        self.starting.pop(worker, None)
        self.log.append(f"stop {worker}")


def words(text: str) -> list[Word]:
    return [Word(name) for name in text.split()]


def dispatcher(script: Script, num_workers: int | Callable[[], int]) -> Dispatcher[Word]:
    return Dispatcher(
        "spelling",
        script,
        num_workers if callable(num_workers) else lambda: num_workers,
        exclusive=lambda word: word.name[0],
        memory_remedy="use shorter words",
        clock=lambda: script.now,
    )


def test_a_hundred_thousand_units_on_512_unequal_workers() -> None:
    """The simulation itself refuses two of a group at a time, and two items on a worker."""
    small = simulate(num_groups=1_000, num_slots=5, num_workers=512, traced=True)
    large = simulate(num_groups=1_000, num_slots=100, num_workers=512, traced=True)
    for run, num_units in ((small, 5_000), (large, 100_000)):
        cluster = run.cluster
        assert cluster.finished == b"\x01" * num_units
        assert run.results == num_units
        assert cluster.num_lost > num_units / 200
        assert sum(cluster.submitted) == num_units + cluster.num_lost
        assert max(cluster.submitted) <= MAX_ATTEMPTS
        assert cluster.idle_s == cluster.blocked_s, "an item that could be handed out never waited for it"
    assert large.idle_frac < 0.01
    assert large.peak_bytes < 1.5 * small.peak_bytes < 3e6


def test_items_finish_on_no_more_workers_than_asked_for() -> None:
    script = Script()
    results = list(dispatcher(script, 2).run(words("a b c d e")))
    assert [(word.name, result) for word, result in results] == [(name, name.upper()) for name in "abcde"]
    assert script.log[:4] == ["start 1", "start 2", "1: a", "2: b"]
    assert sum(line.startswith("start") for line in script.log) == 2
    assert not script.alive


def test_no_more_workers_start_than_there_are_items() -> None:
    script = Script()
    list(dispatcher(script, 8).run(words("a b")))
    assert script.log[:4] == ["start 1", "start 2", "1: a", "2: b"]
    assert "start 3" not in script.log
    assert list(dispatcher(Script(), 8).run([])) == []


def test_a_worker_with_nothing_to_do_is_let_go_while_others_work() -> None:
    script = Script()
    run = dispatcher(script, 2).run(words("a b"))
    next(run), next(run)
    assert script.log[-1] == "stop 1"


def test_a_worker_is_kept_while_items_wait_for_their_key_but_not_for_long() -> None:
    """The other one may be waiting for what it holds."""
    script = Script()
    run = dispatcher(script, 2).run(words("b1 a1 a2 a3"))
    next(run), next(run)
    assert "stop 1" not in script.log
    script.now += IDLE_S
    assert next(run)[0].name == "a2"
    assert "stop 1" in script.log


def test_a_lost_item_is_done_again_before_later_ones_and_its_worker_stopped() -> None:
    script = Script(a=[Lost("died")] * (MAX_ATTEMPTS - 1))
    results = [word.name for word, _ in dispatcher(script, 1).run(words("a b"))]
    assert results == ["a", "b"]
    again = [
        line for worker in range(1, MAX_ATTEMPTS) for line in (f"start {worker}", f"{worker}: a", f"stop {worker}")
    ]
    assert script.log == [*again, "start 5", "5: a", "5: b", "stop 5"]


def test_an_item_lost_too_often_ends_the_run() -> None:
    script = Script(b=[Lost("died"), Lost("died"), Lost("died"), Lost("died"), Lost("node gone")])
    with pytest.raises(StageError, match=r"^spelling: b: lost with its worker 5 times; the last time: node gone$"):
        list(dispatcher(script, 2).run(words("a b c")))
    assert not script.alive


def test_an_item_that_gets_further_may_be_lost_as_often_as_it_likes() -> None:
    """As on a cluster of spot nodes: what counts are losses without a checkpoint between them."""
    lost, steps = Lost("died"), iter([1, 2, 3, 4, 4, 4, 5, 6, 6, 6, 6, 6])
    script = Script(b=[lost] * 8)
    one = dispatcher(script, 1)
    one.mark = lambda word: next(steps)
    assert [word.name for word, _ in one.run(words("a b c"))] == ["a", "b", "c"]

    script = Script(b=[lost] * 20)
    one, steps = dispatcher(script, 1), iter([1, 2, *[3] * 20])
    one.mark = lambda word: next(steps)
    with pytest.raises(StageError, match=r"^spelling: b: lost with its worker 5 times; the last time: died$"):
        list(one.run(words("a b c")))
    assert sum(line.endswith(": b") for line in script.log) == 2 + 1 + MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Failed(OSError("disk full")), "spelling: b: disk full"),
        (Failed(StageError("spelling", "b, step 3", "not finite")), "spelling: b, step 3: not finite"),
        (Lost("4 GB used", why="memory"), "spelling: b: out of memory; use shorter words (4 GB used)"),
    ],
)
def test_what_another_attempt_would_not_help_ends_the_run_at_once(outcome: Outcome, message: str) -> None:
    script = Script(b=[outcome])
    with pytest.raises(StageError) as caught:
        list(dispatcher(script, 2).run(words("a b c d e f")))
    assert str(caught.value) == message
    assert sum(line.endswith(": b") for line in script.log) == 1
    assert "1: d" not in script.log
    assert not script.alive


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Lost("no GPU", why="setup"), "spelling: a worker: could not be set up: no GPU"),
        (Failed(StageError("spelling", "its members", "gone")), "spelling: its members: gone"),
    ],
)
def test_a_worker_that_cannot_be_set_up_ends_the_run_at_once(outcome: Outcome, message: str) -> None:
    script = Script(starts=[Up(), outcome])
    with pytest.raises(StageError) as caught:
        list(dispatcher(script, 2).run(words("a b c d e f")))
    assert str(caught.value) == message
    assert not script.alive


def test_workers_lost_as_they_start_are_replaced_but_not_for_ever() -> None:
    lost = Lost("node gone")
    script = Script(starts=[lost] * 50)  # at the same time, as with a node that was to hold them all
    assert len(list(dispatcher(script, 50).run(words(" ".join(str(number) for number in range(50)))))) == 50

    script = Script(starts=[lost] * (MAX_ATTEMPTS - 1))
    script.start_s = TOGETHER_S
    assert len(list(dispatcher(script, 1).run(words("a b")))) == 2
    script = Script(starts=[lost] * MAX_ATTEMPTS)
    script.start_s = TOGETHER_S
    text = r"^spelling: its workers: 5 times in a row they were lost as they started: node gone$"
    with pytest.raises(StageError, match=text):
        list(dispatcher(script, 1).run(words("a b")))
    assert not script.alive


def test_a_worker_that_never_comes_up_holds_no_item() -> None:
    script = Script(starts=[Up(), None])
    assert [word.name for word, _ in dispatcher(script, 2).run(words("a1 b1 a2 b2"))] == ["a1", "b1", "a2", "b2"]
    assert script.log[:2] == ["start 1", "start 2"]
    assert not any(line.startswith("2:") for line in script.log)
    assert not script.alive


def test_workers_come_and_go_with_the_cluster() -> None:
    room = {0.0: 1, 2 * POLL_S: 3, 5 * POLL_S: 2}
    script = Script()

    def num_workers() -> int:
        return next(num for since, num in reversed(room.items()) if script.now >= since)

    at_work = [1 + len(script.running) for _ in dispatcher(script, num_workers).run(words("a b c d e f g h i j k l"))]
    assert at_work == [1, 1, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1]


def test_a_worker_that_waits_for_a_place_is_given_up_when_the_place_is_gone() -> None:
    script = Script(starts=[Up(), None, None])
    limits = iter([3, 3, 1])
    run = dispatcher(script, lambda: next(limits, 1)).run(words("a b c d"))
    assert next(run)[0].name == "a"
    assert next(run)[0].name == "b"
    assert script.log[3:] == ["1: a", "1: b", "stop 3", "stop 2", "1: c"][: len(script.log) - 3]
    assert [word.name for word, _ in run] == ["c", "d"]
    assert script.alive == set()


def test_an_error_of_the_input_is_found_under_its_wrapping() -> None:
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = InputError([Problem("a.png", "?", "should be an image")])
    with pytest.raises(InputError, match="should be an image"):
        list(dispatcher(Script(a=[Failed(wrapped)]), 1).run(words("a")))


def test_items_of_one_key_run_one_after_another_in_their_order() -> None:
    script = Script(a1=[Lost("died")])
    list(dispatcher(script, 3).run(words("a1 a2 a3 b1 a4 b2 c1 b3")))
    order = [line.split()[-1] for line in script.log if ": " in line]
    assert order[:3] == ["a1", "b1", "c1"]
    assert [name for name in order if name[0] == "a"] == ["a1", "a1", "a2", "a3", "a4"]
    assert [name for name in order if name[0] == "b"] == ["b1", "b2", "b3"]


def test_a_worker_does_not_keep_the_key_that_lags_behind_it() -> None:
    """It takes the other key that is there; the next worker takes the one that waits."""
    script = Script()
    list(dispatcher(script, 2).run(words("a1 b1 a2 c1 d1")))
    assert script.log[2:] == ["1: a1", "2: b1", "1: c1", "2: a2", "1: d1", "stop 2", "stop 1"]


@pytest.mark.parametrize("key", ["a", "abcdefgh"])
def test_items_are_drawn_only_as_workers_and_the_user_take_them(key: str) -> None:
    drawn = 0

    def endless() -> Iterator[Word]:
        nonlocal drawn
        for drawn in count(1):
            yield Word(f"{key[drawn % len(key)]}{drawn}")

    script = Script()
    run = dispatcher(script, 2).run(endless())
    assert len(list(islice(run, 100))) == 100
    assert drawn <= 100 + 2 + 2 * LOOK_AHEAD
    run.close()
    assert not script.alive


def test_the_report_tells_how_many_are_done_and_which_run() -> None:
    script, told = Script(), []
    list(
        dispatcher(script, 2).run(
            words("a b c"), lambda num_done, running: told.append((script.now, num_done, running))
        )
    )
    assert told == [(POLL_S, 1, ["b"]), (2 * POLL_S, 2, ["c"]), (3 * POLL_S, 3, [])]


def test_the_report_comes_once_per_interval() -> None:
    script, told = Script(), []
    slow = Dispatcher("spelling", script, lambda: 1, clock=lambda: script.now / 4)
    list(slow.run(words("a b c d e f g h"), lambda num_done, running: told.append(num_done)))
    assert told == [4, 8]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ray.exceptions.OutOfMemoryError("killed\n4 GB used\nTop 10:"), Lost("killed; 4 GB used", why="memory")),
        (ray.exceptions.RayActorError(error_msg="died"), Lost("died")),
        (ray.exceptions.ActorDiedError(), Lost("The actor died unexpectedly before finishing this task.")),
        (ray.exceptions.RayActorError(error_msg="bad", actor_init_failed=True), Lost("bad", why="setup")),
    ],
)
def test_losses_are_told_apart_by_ray_s_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: Outcome
) -> None:
    def get(reference: object) -> None:
        raise error

    monkeypatch.setattr(executors.ray, "get", get)
    assert outcome_of(None) == outcome


def test_the_dispatcher_needs_no_ray() -> None:
    code = "import sys, teddy_ray.stages.dispatch; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
