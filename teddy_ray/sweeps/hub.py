"""One actor of a sweep: which trial makes what, how far each has come, and what they have to tell."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.progress import Progress
from teddy_ray.stages.claims import Missing

POLL_S = 0.5
"""How often a trial asks for what another one makes."""

SHOW_S = 1.0


class Line(NamedTuple):
    """What a trial says."""

    trial: str
    text: str
    facts: Mapping[str, Any]


class Rung(NamedTuple):
    """How accurate a student was that is not finished."""

    epoch: int
    accuracy: float


class Look(NamedTuple):
    """What there is to show. shares: of each trial that runs, how much of it is done, and a note. made: artifact, as
    kind/fingerprint -> how often it was made."""

    lines: Sequence[Line]
    shares: Mapping[str, tuple[float, str]]
    made: Mapping[str, int]


class _Hub:
    """The actor."""

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}
        self._at_work: dict[str, bool] = {}
        self._gone: set[str] = set()  # a trial that Tune stops goes on until its process has ended
        self._made: Counter[str] = Counter()
        self._lines: list[Line] = []
        self._shares: dict[str, tuple[float, str]] = {}
        self._rungs: dict[str, list[Rung]] = {}

    def take(self, trial: str, keys: Sequence[str]) -> list[str]:
        if trial in self._gone:
            return []
        free = [key for key in keys if self._holders.get(key, trial) == trial]
        self._holders |= dict.fromkeys(free, trial)
        self._at_work[trial] = bool(free)  # or it waits for what another one makes
        return free

    def release(self, trial: str, keys: Sequence[str], made: Sequence[str]) -> None:
        for key in keys:
            if self._holders.get(key) == trial:
                del self._holders[key]
        self._made.update(made)

    def begin(self, trial: str) -> None:
        self.forget(trial)
        self._gone.remove(trial)
        self._at_work[trial] = True

    def num_at_work(self) -> int:
        return sum(self._at_work.values())

    def forget(self, trial: str) -> None:
        self._gone.add(trial)
        self._at_work.pop(trial, None)
        self._holders = {key: holder for key, holder in self._holders.items() if holder != trial}
        self._shares.pop(trial, None)
        self._rungs.pop(trial, None)

    def say(self, line: Line) -> None:
        self._lines.append(line)

    def show(self, trial: str, share: float, note: str) -> None:
        if trial not in self._gone:
            self._shares[trial] = share, note

    def report(self, trial: str, rung: Rung) -> None:
        self._rungs.setdefault(trial, []).append(rung)

    def rungs(self, trial: str) -> list[Rung]:
        return self._rungs.pop(trial, [])

    def look(self) -> Look:
        lines, self._lines = self._lines, []
        return Look(lines, dict(self._shares), dict(self._made))


@dataclass(frozen=True)
class Hub:
    """Picklable. All of a trial's calls come in their order."""

    actor: Any

    @staticmethod
    def open() -> Hub:
        """On the driver's own node, so that no other node's death takes it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return Hub(ray.remote(_Hub).options(num_cpus=0, scheduling_strategy=here).remote())

    def look(self) -> Look:
        """What is new, and how far trials are."""
        look: Look = ray.get(self.actor.look.remote())
        return look

    def begin(self, trial: str) -> None:
        """A trial begins, or begins again: what it had claimed is free."""
        ray.get(self.actor.begin.remote(trial))

    def forget(self, trial: str) -> None:
        """A trial ended: what it had claimed is free."""
        ray.get(self.actor.forget.remote(trial))

    def num_at_work(self) -> int:
        """Trials that do not wait for what another one makes: they share the workers."""
        num: int = ray.get(self.actor.num_at_work.remote())
        return num

    def rungs(self, trial: str) -> list[Rung]:
        """What was reported of a trial since the last call."""
        rungs: list[Rung] = ray.get(self.actor.rungs.remote(trial))
        return rungs


@dataclass(frozen=True)
class Shared:
    """Claims of a trial: what another trial makes is waited for."""

    hub: Hub
    trial: str

    def turns(self, kind: str, missing: Missing) -> Iterator[Sequence[str]]:
        """As `Claims.turns`. Never waits while it holds a claim of this kind, so no two trials wait for each other."""
        actor = self.hub.actor
        while there := missing():
            keys = [f"{kind}/{fingerprint}" for fingerprint in there]
            while not (taken := ray.get(actor.take.remote(self.trial, keys))):
                time.sleep(POLL_S)  # asks no storage, where looking may cost money
            still = set(missing())  # another trial may have finished it since we looked
            mine = [key.partition("/")[2] for key in taken if key.partition("/")[2] in still]
            made: list[str] = []
            try:
                if mine:
                    yield mine
                    made = [f"{kind}/{fingerprint}" for fingerprint in mine]
            finally:
                ray.get(actor.release.remote(self.trial, taken, made))


@dataclass(frozen=True)
class RungsOf:
    """Probes of a trial's first student."""

    hub: Hub
    trial: str
    epochs: Collection[int]

    def __call__(self, epoch: int, accuracy: float) -> None:
        ray.get(self.hub.actor.report.remote(self.trial, Rung(epoch, accuracy)))  # a decision hangs on it


class TrialProgress(Progress):
    """What a trial tells, for the driver to show."""

    def __init__(self, hub: Hub, trial: str) -> None:
        self._hub, self._trial = hub, trial

    def say(self, text: str, **facts: Any) -> None:
        self._hub.actor.say.remote(Line(self._trial, text, facts))

    @contextlib.contextmanager
    def stage(self, stage: str, total: int, what: str) -> Iterator[TrialBar]:  # type: ignore[override]
        yield TrialBar(self._hub, self._trial, stage, total, what)


@dataclass
class TrialBar:
    """Progress of one stage of a trial."""

    hub: Hub
    trial: str
    stage: str
    total: int
    what: str
    _shown: float = field(default=0.0)

    def update(self, done: float, note: str = "") -> None:
        """As `Bar.update`."""
        if time.monotonic() - self._shown >= SHOW_S:
            self._shown = time.monotonic()
            text = f"{self.stage} {done:.1f}/{self.total} {self.what}"
            self.hub.actor.show.remote(self.trial, _share(self.stage, done / self.total), text)


def _share(title: str, done: float) -> float:
    """Of the whole trial, each stage counted as much."""
    titles = ("pool", "statistics", "synthesis", "labels", "evaluation")
    return (titles.index(title) + done) / len(titles) if title in titles else 0.8
