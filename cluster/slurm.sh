#!/bin/bash
# One run on the nodes of a Slurm job, from the repository's root, where .venv is what `make` built on a shared disk:
#   sbatch --nodes=4 --gpus-per-node=2 --cpus-per-task=16 cluster/slurm.sh pipelines/recipes/imagenet1k.yaml --storage /shared/teddy
# Everything after the script goes to pipelines/distill.py. The same command resumes; a preempted job does so by itself.
#SBATCH --job-name=teddy-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=2
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

PATH=$PWD/.venv/bin:$PATH
unset RAY_AUTH_TOKEN
export PYTHONUNBUFFERED=1
export RAY_AUTH_MODE=token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # Ray is ended when nothing runs any more
export RAY_AUTH_TOKEN_PATH=$HOME/.ray/teddy-ray-$SLURM_JOB_ID.token # on the home that all nodes share
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK                       # since Slurm 22.05 steps do not inherit it

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} # where this script runs, and the driver
others=$((${#nodes[@]} - 1))
ip=${HEAD_IP:-$(getent ahostsv4 "$head" | awk '!/^127\./ {print $1; exit}' || true)}
ip=${ip:-$(hostname -I | awk '{print $1}')} # HEAD_IP, where neither is what the other nodes reach
port=$((20000 + SLURM_JOB_ID % 10000))      # above Ray's worker ports, below those that the kernel gives out
address=$ip:$port
folder=/tmp/ray-$SLURM_JOB_ID               # of each node
start=(ray start --disable-usage-stats --block --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="$folder")

steps=()
driver=
finish() {
    trap - EXIT
    kill "${steps[@]}" 2>/dev/null || true # srun passes it on, and `ray start --block` ends what it started
    wait "${steps[@]}" 2>/dev/null || true
    timeout 30 srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" rm -rf "$folder" || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'if [ -n "$driver" ]; then kill "$driver" 2>/dev/null || true; else exit 143; fi' TERM INT

mkdir -p "$HOME/.ray"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    "${start[@]}" --head --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1 &
steps+=($!)
for attempt in {1..60}; do
    if ray health-check --address "$address" >/dev/null 2>&1; then break; fi
    if [ "$attempt" = 60 ] || ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "slurm.sh: Ray's head did not come up at $address" >&2
        exit 1
    fi
    sleep 2
done
if [ "$others" -gt 0 ]; then
    srun --nodes="$others" --ntasks="$others" --exclude="$head" "${start[@]}" --address="$address" &
    steps+=($!)
fi

# without an autoscaler the driver takes the cluster as it finds it, so all nodes have to be there
python - "$address" "${#nodes[@]}" <<'END'
import sys, time, ray
address, expected, deadline = sys.argv[1], int(sys.argv[2]), time.monotonic() + 300
ray.init(address=address, log_to_driver=False)
while (alive := sum(node["Alive"] for node in ray.nodes())) < expected:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {alive} of {expected} nodes joined the cluster within five minutes")
    time.sleep(1)
END

python pipelines/distill.py "$@" --address "$address" &
driver=$!
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do # a signal ends the wait at once, the driver needs a moment
    status=0
    wait "$driver" || status=$?
done
exit "$status"
