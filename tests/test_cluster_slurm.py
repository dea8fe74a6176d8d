"""cluster/slurm.sh, run with stand-ins for Slurm and Ray that note how they are called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "cluster" / "slurm.sh"
STAND_INS = {
    "scontrol": 'printf "%s\\n" $NODES',
    "getent": 'echo "127.0.1.1 STREAM $2"; echo "10.0.0.7 STREAM"',
    # a step lives until it is ended, as `ray start --block` does, but for the last, which deletes
    "srun": """
        echo "srun $*" >> $LOG; case "$*" in *" rm "*) exit ;; esac
        trap "echo ended: ${*: -1} >> $LOG; exit" TERM; while :; do sleep 0.05; done""",
    "ray": 'echo "ray $*" >> $LOG; [ -z "$HEAD_FAILS" ]',
    "sleep": "exec /bin/sleep 0.05",
    "python": """
        case $1 in
        -c) exec REAL_PYTHON "$@" ;;
        -) cat > /dev/null; echo "joined $3" >> $LOG ;;
        *) echo "python $*" >> $LOG; ls -l $RAY_AUTH_TOKEN_PATH | cut -c1-10 >> $LOG; cat $RAY_AUTH_TOKEN_PATH >> $LOG
           echo " $RAY_AUTH_MODE" >> $LOG; trap "/bin/sleep 0.3; echo interrupted >> $LOG; exit 130" TERM
           touch $RUNNING; while [ -n "$DRIVER_WAITS" ]; do /bin/sleep 0.05; done; exit $DRIVER_EXIT ;;
        esac""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job of three nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body.replace('REAL_PYTHON', sys.executable)}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "RUNNING": str(tmp_path / "running"),
        "NODES": "node1 node2 node3",
        "DRIVER_WAITS": "",
        "DRIVER_EXIT": "0",
        "HEAD_FAILS": "",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
    }


def start(job: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), "recipe.yaml", "--set", "data.source=/a b"]
    return subprocess.Popen(command, cwd=job["HOME"], env=job, stderr=subprocess.PIPE, text=True)


def log(job: dict[str, str]) -> list[str]:
    return Path(job["LOG"]).read_text().splitlines()


def token_files(job: dict[str, str]) -> list[Path]:
    return list(Path(job["HOME"], ".ray").iterdir())


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_head_workers_and_driver_are_started_in_turn(job: dict[str, str]) -> None:
    assert start(job).wait(20) == 0
    lines = log(job)
    ray = "ray start --disable-usage-stats --block --num-cpus=16 --temp-dir=/tmp/ray-1234567"
    head = f"srun --nodes=1 --ntasks=1 --nodelist=node1 {ray} --head --node-ip-address=10.0.0.7 --port=24567"
    assert f"{head} --dashboard-host=127.0.0.1" in lines
    assert f"srun --nodes=2 --ntasks=2 --exclude=node1 {ray} --address=10.0.0.7:24567" in lines
    driver = lines.index("python pipelines/distill.py recipe.yaml --set data.source=/a b --address 10.0.0.7:24567")
    assert lines.index("ray health-check --address 10.0.0.7:24567") < lines.index("joined 3") < driver


def test_the_token_is_the_jobs_own_and_nobody_elses_to_read(job: dict[str, str]) -> None:
    for _ in range(2):
        assert start(job).wait(20) == 0
    rights = [number for number, line in enumerate(log(job)) if line == "-rw-------"]
    tokens = [log(job)[number + 1].split() for number in rights]
    assert [mode for _, mode in tokens] == ["token", "token"]
    (first, _), (second, _) = tokens
    assert len(first) == 64
    assert first != second
    assert token_files(job) == []


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_drivers_status_is_the_jobs_and_ray_is_ended(job: dict[str, str], status: int) -> None:
    job["DRIVER_EXIT"] = str(status)
    assert start(job).wait(20) == status
    ended = [line for line in log(job) if line.startswith("ended")]
    assert sorted(ended) == ["ended: --address=10.0.0.7:24567", "ended: --dashboard-host=127.0.0.1"]
    assert log(job)[-1] == "srun --nodes=3 --ntasks=3 rm -rf /tmp/ray-1234567"


def test_one_node_has_no_further_workers(job: dict[str, str]) -> None:
    job["NODES"] = "node1"
    assert start(job).wait(20) == 0
    assert len([line for line in log(job) if line.startswith("srun") and "ray start" in line]) == 1
    assert "joined 1" in log(job)


def test_a_preempted_job_lets_the_driver_end_and_then_ray(job: dict[str, str]) -> None:
    job["DRIVER_WAITS"] = "yes"
    running = start(job)
    deadline = time.monotonic() + 20
    while not Path(job["RUNNING"]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 130
    lines = log(job)
    assert all(lines.index("interrupted") < number for number, line in enumerate(lines) if line.startswith("ended"))
    assert token_files(job) == []


def test_a_head_that_does_not_come_up_ends_the_job(job: dict[str, str]) -> None:
    job["HEAD_FAILS"] = "yes"
    running = start(job)
    assert running.wait(60) == 1
    assert running.stderr is not None
    assert "slurm.sh: Ray's head did not come up at 10.0.0.7:24567" in running.stderr.read()
    assert not any(line.startswith("python") for line in log(job))
    assert token_files(job) == []


def test_a_preempted_job_comes_back_to_its_queue() -> None:
    options = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--requeue", "--exclusive", "--signal=B:TERM@120"} <= options
