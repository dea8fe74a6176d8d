"""Nodes die and join: the stages go on with those that are there, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run, content_hashes, copy_artifacts, tiny
from emulated import EmulatedCluster, driver

from teddy_ray.recipe_file import dump_recipe

RUN_STAGE = str(Path(__file__).parent / "run_stage.py")

KINDS = {"pool": "member", "statistics": "chunk", "synthesis": "unit", "labels": "shard", "evaluation": "student"}
"""The artifacts that a stage's workers publish one by one."""

MADE = {"pool": ["member"], "statistics": ["statistics", "moments"], "synthesis": ["unit"], "labels": ["shard"]}
"""What of a stage has bytes to compare; of evaluation it is the accuracies."""

LONGER = {
    "statistics": {"statistics__chunk_size": 10},
    "synthesis": {"synthesis__steps": 300, "synthesis__checkpoint_s": 0.2},
}
"""Enough work for nodes to come and go in it: 36 chunks; ten units, five of which may run at the same time."""


@pytest.fixture
def cluster() -> Iterator[EmulatedCluster]:
    cluster = EmulatedCluster()
    yield cluster
    cluster.close()


def manifests(folder: Path, kind: str) -> dict[str, dict[str, object]]:
    paths = (folder / "artifacts" / kind).glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def accuracies(folder: Path) -> dict[str, object]:
    return {key: one["accuracy"] for key, one in manifests(folder, "student").items()}


def write_recipe(folder: Path, address: str, **overrides: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(tiny(folder, cluster={"address": address}, **overrides)))
    return str(path)


def undisturbed(finished: Run, folder: Path, address: str, stage: str) -> set[object]:
    """The stage with nothing in its way. Gives the nodes that worked."""
    copy_artifacts(finished, stage, folder)
    kept = NodesSeen(folder, stage)
    with driver(RUN_STAGE, stage, write_recipe(folder, address, **LONGER.get(stage, {}))) as program:
        assert program.follow(kept.look) == 0, program.text
    return kept.nodes


class NodesSeen:
    """The nodes of the artifacts of a stage, some of which are deleted as it ends."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder, self._kind = folder / "artifacts" / KINDS[stage], KINDS[stage]
        self.nodes: set[object] = set()

    def look(self) -> None:
        for path in self._folder.glob("*/manifest.json"):
            try:
                self.nodes.add(json.loads(path.read_text())["node"])
            except (FileNotFoundError, KeyError):
                continue


@pytest.mark.parametrize("stage", ["statistics", "synthesis"])
def test_a_node_dies_and_another_joins(finished: Run, tmp_path: Path, cluster: EmulatedCluster, stage: str) -> None:
    """All nodes work, the one that joins late included; the bytes are those of an undisturbed run."""
    seen = undisturbed(finished, tmp_path / "quiet", cluster.address, stage)
    assert len(seen) == 3

    folder = tmp_path / "killed"
    copy_artifacts(finished, stage, folder)
    kept, at_work = NodesSeen(folder, stage), folder / "artifacts" / KINDS[stage]
    with driver(RUN_STAGE, stage, write_recipe(folder, cluster.address, **LONGER[stage])) as program:
        program.wait_for(lambda: len(list(at_work.glob("*/manifest.json"))) >= 2)
        cluster.kill(cluster.nodes[0])
        cluster.add()
        assert program.follow(kept.look) == 0, program.text
    assert "the cluster now has" in program.text
    if stage == "synthesis":  # which lasts long enough for it
        assert len(kept.nodes) == 4, program.text
    for kind in MADE[stage]:
        assert content_hashes(folder, kind) == content_hashes(tmp_path / "quiet", kind)
    assert not list(folder.glob("artifacts/.checkpoints/*/*"))
