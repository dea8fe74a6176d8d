"""What a session does about its cluster: waits for an autoscaler, refuses what can never be, checks what nodes see."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import Run, open_session, tiny

from teddy_ray.errors import InputError
from teddy_ray.stages import autoscaler, reach, session
from teddy_ray.stages.nodes import Nodes, bundles, misfits

CONFIGURED = {"node_type_mapping": {"10.0.0.1": "ray.head.default"}, "pending_launches": {}, "pending_nodes": []}
PLAIN = {"node_type_mapping": {"10.0.0.1": "node_37beef"}}


@pytest.mark.parametrize(("node", "room"), [((8, 0), 2), ((7, 4), 1), ((3, 8), 0)])
def test_workers_lie_on_one_node_whole(node: tuple[float, float], room: int) -> None:
    part = tiny(Path(), synthesis__threads=4).synthesis
    assert Nodes([node]).room(part) == room
    assert Nodes([node, node, (4, 0)]).room(part) == 2 * room + 1


@pytest.mark.parametrize(("share", "room"), [(1.0, 4), (0.5, 8), (2.0, 2), (3.0, 1), (0.2, 20), (0.1, 40), (0.3, 12)])
def test_workers_share_gpus_or_take_several(share: float, room: int) -> None:
    part = tiny(Path(), synthesis__gpus_per_worker=share).synthesis
    assert Nodes([(64, 4)]).room(part) == room
    assert Nodes([(64, 0)]).room(part) == 0
    assert bundles(part, 2) == [{"CPU": 1, "GPU": share}] * 2


def test_what_does_not_fit_is_named_with_what_there_is() -> None:
    recipe = tiny(Path(), synthesis__gpus_per_worker=1, labels__num_workers=9)
    texts = [str(problem) for problem in misfits(recipe, Nodes([(4, 0), (4, 0)]))]
    assert texts == [
        "synthesis.gpus_per_worker: found 1.0; lower it, or give cluster.address of a larger cluster: "
        "1 worker(s) of 1 CPU(s) and 1 GPU(s) each do not fit on 8 CPUs and 0 GPUs on 2 node(s)",
        "labels.num_workers: found 9; lower it, or give cluster.address of a larger cluster: "
        "9 worker(s) of 1 CPU(s) and 0 GPU(s) each do not fit on 8 CPUs and 0 GPUs on 2 node(s)",
    ]


class Told:
    """Takes the lines of a progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str, **facts: Any) -> None:
        self.lines.append(text)


class FakeCluster:
    """An autoscaler that brings nodes with GPUs after some seconds of a clock of its own, or never."""

    def __init__(self, brings_after_s: float, is_at_it: bool) -> None:
        self.now, self.asked, self._brings_after_s, self._is_at_it = 0.0, list[Any](), brings_after_s, is_at_it

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def nodes(self) -> list[dict[str, Any]]:
        small = {"NodeID": "small", "Alive": True, "Resources": {"CPU": 4.0}}
        large = {"NodeID": "large", "Alive": self.now >= self._brings_after_s, "Resources": {"CPU": 8.0, "GPU": 4.0}}
        return [small, large]

    def put_in(self, patch: pytest.MonkeyPatch, *, exists: bool = True) -> None:
        patch.setattr(session, "time", self)
        patch.setattr(session.ray, "nodes", self.nodes)
        patch.setattr(autoscaler, "exists", lambda: exists)
        patch.setattr(autoscaler, "is_at_it", lambda: self._is_at_it)
        patch.setattr(autoscaler, "ask", self.asked.append)


def waiting_session(folder: Path) -> tuple[session.Session, Told]:
    opened = open_session(tiny(folder, synthesis__gpus_per_worker=1, synthesis__num_workers=3))
    opened.progress = told = Told()  # type: ignore[assignment]
    opened._read_resources()
    return opened, told


def test_nodes_that_an_autoscaler_brings_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(brings_after_s=40, is_at_it=True)
    cluster.put_in(monkeypatch)
    opened, told = waiting_session(tmp_path)
    opened._await_resources()
    assert 40 <= cluster.now <= 42
    assert cluster.asked == [[{"CPU": 1, "GPU": 1.0}] * 3, []]
    assert len(told.lines) == 3
    assert told.lines[0].startswith("waiting up to 600 s for the autoscaler: synthesis.gpus_per_worker: found 1.0; ")
    assert told.lines[-1] == "0 node(s) lost, 1 joined: the cluster now has 12 CPUs and 4 GPUs on 2 node(s)"


@pytest.mark.parametrize(
    ("exists", "is_at_it", "least", "most"), [(False, False, 0, 0), (True, False, 5, 15), (True, True, 600, 603)]
)
def test_what_never_comes_is_an_error_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, is_at_it: bool, least: float, most: float
) -> None:
    """At once without an autoscaler, within 15 s of one that does nothing, after cluster.wait_s of one that tries."""
    cluster = FakeCluster(brings_after_s=10_000, is_at_it=is_at_it)
    cluster.put_in(monkeypatch, exists=exists)
    opened, _ = waiting_session(tmp_path)
    with pytest.raises(InputError, match=r"synthesis.gpus_per_worker: found 1.0; lower it"):
        opened._await_resources()
    assert least <= cluster.now <= most
    assert cluster.asked[-1:] in ([], [[]])


def test_stages_are_asked_for_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They never run at the same time: the sum of what they need is more than it takes."""
    cluster = FakeCluster(brings_after_s=40, is_at_it=True)
    cluster.put_in(monkeypatch)
    opened = open_session(
        tiny(tmp_path, statistics__gpus_per_worker=1, statistics__num_workers=2, labels__num_workers=9)
    )
    opened._read_resources()
    opened._await_resources()
    assert cluster.asked == [[{"CPU": 1, "GPU": 1.0}] * 2, []]


def test_a_stage_asks_the_autoscaler_for_what_it_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(brings_after_s=30, is_at_it=True)
    cluster.put_in(monkeypatch)
    opened = open_session(tiny(tmp_path, synthesis__num_workers="auto"))
    part = opened.recipe.synthesis
    with opened.hiring(part, at_most=9) as num_workers:
        assert num_workers() == 4
        cluster.now = 31
        assert num_workers() == 9
        cluster.now = 31 + session.ASK_EVERY_S  # another run may have asked for something else since
        num_workers()
        num_workers.at_most = 2  # the rest is done
        assert num_workers() == 2
        assert num_workers() == 2
    assert cluster.asked == [[{"CPU": 1}] * 9, [{"CPU": 1}] * 9, [{"CPU": 1}] * 2, []]
    with opened.hiring(part.model_copy(update={"num_workers": 2}), at_most=9) as num_workers:
        assert num_workers() == 2


@pytest.mark.parametrize(
    ("report", "exists", "is_at_it"),
    [
        (CONFIGURED, True, False),
        (PLAIN, False, False),
        ({}, False, False),
        ({**CONFIGURED, "pending_launches": {"worker": 2}}, True, True),
        ({**CONFIGURED, "pending_nodes": [["10.0.0.2", "worker", "setting-up"]]}, True, True),
        (
            {
                **CONFIGURED,
                "node_availability_summary": {"node_availabilities": {"worker": {"is_available": False}}},
            },
            True,
            True,
        ),
    ],
)
def test_the_first_autoscaler_is_known_by_its_report(
    monkeypatch: pytest.MonkeyPatch, report: dict[str, Any], exists: bool, is_at_it: bool
) -> None:
    monkeypatch.setattr(autoscaler, "is_autoscaler_v2", lambda fetch_from_server=False: False)
    monkeypatch.setattr(autoscaler, "_internal_kv_get", lambda key: json.dumps({"autoscaler_report": report}).encode())
    assert autoscaler.exists() is exists
    assert autoscaler.is_at_it() is is_at_it


@pytest.mark.parametrize(
    ("status", "is_at_it"),
    [
        (SimpleNamespace(pending_launches=[], pending_nodes=[], failed_launches=[]), False),
        (SimpleNamespace(pending_launches=["one"], pending_nodes=[], failed_launches=[]), True),
        (SimpleNamespace(pending_launches=[], pending_nodes=[], failed_launches=["no spot capacity"]), True),
    ],
)
def test_the_second_autoscaler_is_asked_for_its_status(
    shared_ray: None, monkeypatch: pytest.MonkeyPatch, status: SimpleNamespace, is_at_it: bool
) -> None:
    monkeypatch.setattr(autoscaler, "is_autoscaler_v2", lambda fetch_from_server=False: True)
    monkeypatch.setattr(autoscaler, "get_cluster_status", lambda address: status)
    assert autoscaler.exists()
    assert autoscaler.is_at_it() is is_at_it


def test_a_stage_without_a_node_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(brings_after_s=70, is_at_it=True)
    cluster.put_in(monkeypatch)
    opened = open_session(tiny(tmp_path, synthesis__gpus_per_worker=1))
    opened.progress = told = Told()  # type: ignore[assignment]
    for cluster.now in range(0, 100, 10):
        opened.workers(opened.recipe.synthesis, at_most=5)
    waiting = "waiting for a node: none has room for {'CPU': 1, 'GPU': 1.0}"
    assert told.lines == [
        waiting,
        waiting,
        "0 node(s) lost, 1 joined: the cluster now has 12 CPUs and 4 GPUs on 2 node(s)",
    ]


def test_a_ray_of_one_s_own_has_no_autoscaler(shared_ray: None) -> None:
    assert not autoscaler.exists()


def test_storage_and_data_that_a_node_does_not_see_are_refused(finished: Run, tmp_path: Path, shared_ray: None) -> None:
    opened = open_session(tiny(tmp_path))
    reach.check_reach(opened.storage, opened.source_ref)
    assert not list(tmp_path.rglob("probe"))

    class Elsewhere(type(opened.storage)):  # type: ignore[misc]
        """As a folder is on a machine that does not have it."""

        def is_file(self, path: str) -> bool:
            return False

    with pytest.raises(InputError) as caught:
        reach.check_reach(Elsewhere(str(tmp_path)), opened.source_ref)
    address = ray.nodes()[0]["NodeManagerAddress"]
    assert str(caught.value) == (
        f"storage: found {str(tmp_path)!r}; node {address} of the cluster does not see this folder; "
        "give a URI that all nodes can open"
    )


def test_nodes_are_asked_for_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    opened = open_session(tiny(tmp_path))
    monkeypatch.setattr(session.ray, "nodes", lambda: asked.append(time.monotonic()) or [])
    for _ in range(100):
        opened.workers(opened.recipe.synthesis, at_most=5)
    assert len(asked) == 1
