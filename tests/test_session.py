"""Joining a cluster: what is asked of its autoscaler, and when there is nobody to ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import open_session, tiny

from teddy_ray.errors import InputError
from teddy_ray.stages import session as module
from teddy_ray.stages.session import Session, _has_autoscaler


@pytest.mark.parametrize(
    ("second", "status", "expected"),
    [
        (True, None, True),  # KubeRay and `ray up`: the second autoscaler keeps no status where the first one does
        (False, None, False),
        (False, {"autoscaler_report": None}, False),
        (False, {"autoscaler_report": {"node_type_mapping": {"10.0.0.1": "node_4f2a"}}}, False),
        (False, {"autoscaler_report": {"node_type_mapping": {"10.0.0.1": "head", "10.0.0.2": "gpu"}}}, True),
    ],
)
def test_who_may_bring_nodes(
    monkeypatch: pytest.MonkeyPatch, second: bool, status: dict[str, Any] | None, expected: bool
) -> None:
    monkeypatch.setattr(module, "is_autoscaler_v2", lambda fetch_from_server: second and fetch_from_server)
    monkeypatch.setattr(module, "_internal_kv_get", lambda key: status and json.dumps(status).encode())
    assert _has_autoscaler() is expected


Joined = Callable[..., tuple[Session, list[list[dict[str, float]]]]]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Joined:
    """A session on a cluster that gets a node of 4 CPUs each time it is looked at, and what was asked for."""

    def join(*, autoscaler: bool, **overrides: Any) -> tuple[Session, list[list[dict[str, float]]]]:
        asked: list[list[dict[str, float]]] = []
        nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {}}]

        def grown() -> list[dict[str, Any]]:
            nodes.append({"Alive": True, "Resources": {"CPU": 4.0}})
            return nodes

        monkeypatch.setattr(module, "_has_autoscaler", lambda: autoscaler)
        monkeypatch.setattr(module, "request_resources", lambda bundles: asked.append(bundles))
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(module.ray, "nodes", grown)
        session = open_session(tiny(tmp_path, **overrides))
        session._read_resources()
        return session, asked

    return join


def test_one_stage_after_another_is_asked_for_and_in_the_end_nothing(joined: Joined) -> None:
    session, asked = joined(autoscaler=True, pool__num_workers=6, statistics__num_workers=9, synthesis__num_workers=2)
    session._await_resources()
    pool, statistics = [{"CPU": 1, "GPU": 0.0}] * 6, [{"CPU": 1, "GPU": 0.0}] * 9
    assert asked == [pool, statistics, []]
    assert str(session.nodes) == "12 CPUs and 0 GPUs on 4 node(s)"


def test_what_is_there_is_not_asked_for(joined: Joined) -> None:
    session, asked = joined(autoscaler=True, pool__num_workers=4)
    session._await_resources()
    assert asked == []


def test_without_an_autoscaler_nothing_is_waited_for(joined: Joined) -> None:
    session, asked = joined(autoscaler=False, pool__num_workers=5)
    with pytest.raises(InputError, match=r"pool.num_workers: found 5.*4 CPUs and 0 GPUs on 2 node"):
        session._await_resources()
    assert asked == []


def test_the_wait_ends(joined: Joined) -> None:
    session, _ = joined(autoscaler=True, pool__num_workers=5, cluster={"wait_s": 0.0})
    with pytest.raises(InputError, match=r"pool.num_workers: found 5"):
        session._await_resources()
