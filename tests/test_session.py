"""Joining a cluster: what is asked of its autoscaler, and when there is nobody to ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import open_session, tiny

from teddy_ray.errors import InputError
from teddy_ray.stages import session as module
from teddy_ray.stages.session import Session, _has_autoscaler

HEAD_ID = "f" * 51 + "00000"


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


@pytest.fixture
def autoscaled(tmp_path: Path) -> Iterator[str]:
    """Address of a cluster with token authentication and Ray's second autoscaler. Its head has no CPU; nodes of one
    CPU, which are processes here, come when they are asked for."""
    port, temporary = 20000 + os.getpid() % 10000, Path("/tmp", f"teddy-{os.getpid()}")  # sockets want a short path
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD_ID,
    }
    phases = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    (tmp_path / "autoscaler.yaml").write_text(
        yaml.safe_dump(
            {
                "cluster_name": "test",
                "provider": provider,
                "max_workers": 2,
                "idle_timeout_minutes": 5,
                "head_node_type": "ray.head.default",  # the one name that the stand-in of a cloud knows
                "available_node_types": {
                    name: {
                        "node_config": {},
                        "max_workers": 2 * num_cpus,
                        "resources": {"CPU": num_cpus, "object_store_memory": 10**8},
                    }
                    for name, num_cpus in (("ray.head.default", 0), ("worker", 1))
                },
                **{f"{phase}_commands": [] for phase in phases},
                **{name: {} for name in ("auth", "docker", "file_mounts")},
                **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
                "file_mounts_sync_continuously": False,
                "upscaling_speed": 1.0,
            }
        )
    )
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    ray = [str(Path(sys.executable).parent / "ray")]
    subprocess.run([*ray, "get-auth-token", "--generate"], env=environment, capture_output=True, check=True)
    options = [f"--port={port}", f"--temp-dir={temporary}", f"--autoscaling-config={tmp_path / 'autoscaler.yaml'}"]
    options += ["--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    options += [f"--ray-client-server-port={port + 1}", f"--dashboard-port={port + 2}"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen([*ray, "start", "--head", *options], env=environment, stdout=log, stderr=log)
    try:
        check = [*ray, "health-check", "--address", f"127.0.0.1:{port}"]
        deadline = time.monotonic() + 60
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(60)
        for entry in Path("/proc").iterdir():  # nodes that outlive their head
            if entry.name.isdigit() and f"{temporary}/".encode() in _command_of(entry):
                os.kill(int(entry.name), signal.SIGKILL)


def _command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_workers_come_from_none_on_a_cluster_with_the_second_autoscaler(autoscaled: str, tmp_path: Path) -> None:
    recipe = {"pool.num_workers": 2, "cluster.wait_s": 90, "cluster.address": autoscaled, "storage": str(tmp_path)}
    code = f"""
from teddy_ray.flow import prepare
from teddy_ray.progress import Progress
from teddy_ray.recipe_file import load_recipe
from teddy_ray.stages.session import Session
overrides = [f"{{key}}={{value}}" for key, value in {recipe!r}.items()]
prepared = prepare(load_recipe("pipelines/recipes/digits.yaml", overrides, {{}}))
Session(prepared.plan, prepared.source, prepared.storage, Progress()).start()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=200, env={**os.environ, "RAY_AUTH_MODE": "token"}
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "waiting up to 90 s for the autoscaler: pool.threads: found 1" in said
    assert f"joined the Ray cluster at {autoscaled} (2 CPUs and 0 GPUs on 3 node(s))" in said
