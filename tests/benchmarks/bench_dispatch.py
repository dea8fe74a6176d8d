"""Cost of handing out units, on a simulated cluster of 512 unequal workers: `make bench`.

The dispatcher is the real one; workers, clock and losses are those of tests/simulation.py, which defines idle.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation import simulate

NUM_WORKERS, NUM_GROUPS = 512, 1_000


def main() -> None:
    """Simulate twice per size: once for the time, once for the memory."""
    print(f"{NUM_WORKERS} workers of 1x to 4x speed, {NUM_GROUPS:,} groups of classes, 1 % of the units lost\n")
    print("| units | ms per unit, simulation included | idle | of it blocked by groups | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    for num_slots in (1, 10, 100):
        run = simulate(NUM_GROUPS, num_slots, NUM_WORKERS)
        peak_mb = simulate(NUM_GROUPS, num_slots, NUM_WORKERS, traced=True).peak_bytes / 1e6
        cluster, ms = run.cluster, 1e3 * run.wall_s / run.results
        blocked = cluster.blocked_s / cluster.busy_s
        print(f"| {run.results:,} | {ms:.3f} | {run.idle_frac:.2%} | {blocked:.2%} | {peak_mb:.2f} |")


if __name__ == "__main__":
    main()
