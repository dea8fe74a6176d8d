"""Jobs on a cluster that `ray start` made: submitted, stopped, submitted again; refused where the recipe is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import content_hashes, marked_processes

from teddy_ray.storage import Storage
from teddy_ray.summary import read_summary

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

SMALL = [
    *("pool.seeds=[0]", "pool.snapshots=[1, 2]", "data.limit_per_class=40"),
    *("synthesis.images_per_class=2", "synthesis.steps=20", "labels.views=4"),
    *(
        "evaluation.epochs=2",
        "evaluation.full_data_epochs=1",
        "evaluation.seeds=[0]",
        "evaluation.controls=[random_soft]",
    ),
]
"""The digits recipe made quick."""


@dataclass(frozen=True)
class Submission:
    """What `ray job submit` printed and how it ended."""

    status: int
    output: str


@dataclass(frozen=True)
class RayCluster:
    """A head with two CPUs, started from the command line, that listens on loopback."""

    address: str
    dashboard: str
    env: dict[str, str]

    def submit(self, *entrypoint: str, name: str = "") -> subprocess.Popen[str]:
        """Submit a job with the repository for its working folder, as a user does."""
        named = ["--submission-id", name] if name else []
        command = [BIN / "ray", "job", "submit", "--address", self.dashboard, *named, "--working-dir", ".", "--"]
        return subprocess.Popen(
            [*command, sys.executable, *entrypoint],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
            cwd=REPOSITORY,
        )

    def run(self, *entrypoint: str) -> Submission:
        submission = self.submit(*entrypoint)
        output, _ = submission.communicate(timeout=400)
        return Submission(submission.returncode, output)

    def is_up(self) -> bool:
        """Whether jobs are taken: the agent comes up some seconds after the port."""
        command = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--", "true"]
        return subprocess.run(command, capture_output=True, env=self.env, timeout=120).returncode == 0

    def status_of(self, name: str) -> str:
        command = [BIN / "ray", "job", "status", "--address", self.dashboard, name]
        return subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=60).stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    mark = {"TEDDY_TEST": uuid.uuid4().hex}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    env = {**os.environ, **mark, **token, "PATH": f"{BIN}:{os.environ['PATH']}"}
    port, dashboard, agent, client = (free_port() for _ in range(4))  # another Ray of these tests has the usual ones
    listen = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    listen += ["--node-ip-address=127.0.0.1", f"--ray-client-server-port={client}"]
    sizes = ["--num-cpus=2", "--object-store-memory=150000000"]
    start = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", *listen, *sizes]
    log = tmp_path_factory.mktemp("head") / "log"
    with open(log, "w") as stream:
        head = subprocess.Popen(start, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env)
        deadline = time.monotonic() + 120
        while not listens(dashboard) or not cluster.is_up():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield cluster
    finally:
        head.terminate()
        deadline = time.monotonic() + 20
        while marked_processes(mark["TEDDY_TEST"]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in marked_processes(mark["TEDDY_TEST"]):
            os.kill(pid, signal.SIGKILL)
        head.wait()


def test_a_wrong_recipe_fails_the_job_with_its_message(cluster: RayCluster) -> None:
    job = cluster.run("pipelines/distill.py", "pipelines/recipes/digits.yaml", "--set", "synthesis.stepz=5")
    assert job.status != 0
    assert "teddy-ray: error: synthesis.stepz: found 5" in job.output
    assert re.search(r"Job '\S+' failed", job.output)
    assert "exit code 2" in job.output


@pytest.mark.slow
def test_a_job_is_stopped_and_submitted_again(cluster: RayCluster, tmp_path: Path) -> None:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    job = ["pipelines/distill.py", "pipelines/recipes/digits.yaml", "--storage", str(tmp_path), *settings]
    first = cluster.submit(*job, name="first")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("artifacts/unit/*/manifest.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stop = [BIN / "ray", "job", "stop", "--address", cluster.dashboard, "first"]
    subprocess.run(stop, check=True, env=cluster.env, capture_output=True, timeout=120)
    first.communicate(timeout=60)
    assert "Job 'first' was stopped" in cluster.status_of("first")
    assert not (tmp_path / "runs").exists()
    units = content_hashes(tmp_path, "unit")

    second = cluster.run(*job)
    assert second.status == 0, second.output
    assert "joined the Ray cluster" in second.output
    assert re.search(r"pool +reused", second.output)
    assert re.search(r"statistics +reused", second.output)
    assert "random real images, same soft labels" in second.output
    assert units.items() <= content_hashes(tmp_path, "unit").items()
    assert read_summary(Storage(str(tmp_path)), "digits") is not None


@pytest.mark.slow
def test_a_driver_outside_joins_by_address(cluster: RayCluster, tmp_path: Path) -> None:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "teddy_ray.cli", "distill", "pipelines/recipes/digits.yaml", *settings]
    run = subprocess.run(
        [*command, "--storage", str(tmp_path), "--address", cluster.address],
        capture_output=True,
        text=True,
        env=cluster.env,
        cwd=REPOSITORY,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    assert f"joined the Ray cluster at {cluster.address}" in run.stderr
    assert "random real images, same soft labels" in run.stdout
