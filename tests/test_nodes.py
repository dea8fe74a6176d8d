"""Nodes die and join: the stages go on with those that are there, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import STAGES, Run, content_hashes, copy_artifacts, open_session, tiny
from emulated import EmulatedCluster, driver

from teddy_ray.recipe_file import dump_recipe
from teddy_ray.stages import synthesis

RUN_STAGE = str(Path(__file__).parent / "run_stage.py")

KINDS = {"pool": "member", "statistics": "chunk", "synthesis": "unit", "labels": "shard", "evaluation": "student"}
"""The artifacts that a stage's workers publish one by one."""

MADE = {"pool": ["member"], "statistics": ["statistics", "moments"]}
"""What these stages publish whole, in bytes that can be compared."""

LONGER = {
    "statistics": {"statistics__chunk_size": 2, "statistics__batch_size": 2},
    "synthesis": {"synthesis__steps": 2000, "synthesis__checkpoint_s": 0.5},
}
"""Enough work for a node to come in the middle: 180 chunks; ten units, five of which may run at the same time."""


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
    """With as many workers as the cluster holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    workers = {f"{stage}__num_workers": "auto" for stage in STAGES}
    path.write_text(dump_recipe(tiny(folder, cluster={"address": address}, **workers, **overrides)))
    return str(path)


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


IN_FLIGHT = {
    "synthesis__images_per_class": 2,
    "synthesis__classes_per_unit": 4,
    "synthesis__steps": 1500,
    "synthesis__checkpoint_s": 0.2,
}
"""Three units of some seconds, one for each node."""


def test_a_node_dies_with_a_unit_in_its_hands(finished: Run, tmp_path: Path, cluster: EmulatedCluster) -> None:
    """Another node goes on with it from its last checkpoint, to the bytes of a run of one worker without losses."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    for folder in (quiet, killed):
        copy_artifacts(finished, "synthesis", folder)
    checkpoints, log = killed / "artifacts" / ".checkpoints" / "unit", "lost the worker of classes"
    with driver(RUN_STAGE, "synthesis", write_recipe(killed, cluster.address, **IN_FLIGHT)) as program:
        program.wait_for(lambda: len(list(checkpoints.glob("*.safetensors"))) == 3)
        cluster.kill(cluster.nodes[0])
        cluster.add()
        assert program.finish() == 0, program.text
    assert program.text.count(log) == 1, program.text
    assert "node(s) lost" in program.text
    units = manifests(killed, "unit").values()
    assert sum(unit["resumed_at"] > 0 for unit in units) == 1  # type: ignore[operator]
    synthesis.run(open_session(tiny(quiet, **IN_FLIGHT)))
    assert content_hashes(killed, "unit") == content_hashes(quiet, "unit")
    assert not list(checkpoints.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pool", "statistics", "labels", "evaluation"])
def test_a_stage_loses_a_node_and_gets_another(
    finished: Run, tmp_path: Path, cluster: EmulatedCluster, stage: str
) -> None:
    """The bytes are those of one worker on one machine."""
    copy_artifacts(finished, stage, tmp_path)
    at_work = tmp_path / "artifacts" / KINDS[stage]
    with driver(RUN_STAGE, stage, write_recipe(tmp_path, cluster.address)) as program:
        program.wait_for(lambda: len(list(at_work.glob("*/manifest.json"))) >= 1)
        cluster.kill(cluster.nodes[0])
        cluster.add()
        assert program.finish() == 0, program.text
    for kind in MADE.get(stage, []):
        assert content_hashes(tmp_path, kind) == content_hashes(finished.folder, kind)
    if stage == "labels":  # of the distilled set; controls are labelled later
        shards = content_hashes(tmp_path, "shard")
        assert len(shards) == 3
        assert shards.items() <= content_hashes(finished.folder, "shard").items()
    if stage == "evaluation":
        assert accuracies(tmp_path) == accuracies(finished.folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["statistics", "synthesis"])
def test_all_nodes_work_and_so_does_one_that_joins_late(
    finished: Run, tmp_path: Path, cluster: EmulatedCluster, stage: str
) -> None:
    """Nothing dies: to the two nodes that begin comes a third."""
    cluster.kill(cluster.nodes[0])
    copy_artifacts(finished, stage, tmp_path)
    seen, at_work = NodesSeen(tmp_path, stage), tmp_path / "artifacts" / KINDS[stage]
    with driver(RUN_STAGE, stage, write_recipe(tmp_path, cluster.address, **LONGER[stage])) as program:
        program.wait_for(lambda: len(list(at_work.glob("*/manifest.json"))) >= 2)
        cluster.add()
        assert program.follow(seen.look) == 0, program.text
    assert len(seen.nodes) == 3, program.text
    assert "the cluster now has 3 CPUs" in program.text


@pytest.mark.slow
def test_a_whole_run_loses_a_node_in_every_stage(finished: Run, tmp_path: Path, cluster: EmulatedCluster) -> None:
    """One is added each time. All that is published has the bytes of a run on one worker of one machine."""
    recipe = write_recipe(tmp_path, cluster.address)
    waiting = list(KINDS)

    def look() -> None:
        if waiting and list((tmp_path / "artifacts").glob(f"{KINDS[waiting[0]]}/*/manifest.json")):
            cluster.kill(cluster.nodes[0])
            cluster.add()
            waiting.pop(0)

    with driver("-m", "teddy_ray.cli", "distill", recipe) as program:
        assert program.follow(look, timeout_s=900) == 0, program.text
    assert not waiting
    assert program.text.count("1 node(s) lost") >= len(KINDS) - 1  # two that die together are told of together
    for kind in ("member", "moments", "statistics", "unit", "shard"):
        assert content_hashes(tmp_path, kind) == content_hashes(finished.folder, kind)
    assert accuracies(tmp_path) == accuracies(finished.folder)
    for file in finished.folder.glob("runs/tiny/distilled/data/*"):
        assert (tmp_path / "runs" / "tiny" / "distilled" / "data" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(KINDS))
def test_a_driver_killed_hard_in_any_stage_is_resumed(
    finished: Run, tmp_path: Path, cluster: EmulatedCluster, stage: str
) -> None:
    """The cluster outlives it. Nothing is half published; what was finished is not done again."""
    copy_artifacts(finished, stage, tmp_path)
    recipe = write_recipe(tmp_path, cluster.address, **LONGER.get(stage, {}))
    published = (tmp_path / "artifacts" / KINDS[stage]).glob
    with driver("-m", "teddy_ray.cli", "distill", recipe) as program:
        program.wait_for(lambda: bool(list(published("*/manifest.json"))))
        program.kill()
    assert not (tmp_path / "artifacts" / stage).exists()
    assert not (tmp_path / "runs").exists()
    for folder in (tmp_path / "artifacts").glob("*/*"):
        assert folder.parent.name.startswith(".") or (folder / "manifest.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in published("*/manifest.json")}

    with driver("-m", "teddy_ray.cli", "distill", recipe) as program:
        assert program.finish(timeout_s=400) == 0, program.text
    kept = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert kept.items() <= before.items()
    if stage != "statistics":  # whose chunks are deleted in the end
        assert kept == before
    if stage not in LONGER:
        for kind in ("member", "moments", "statistics", "unit", "shard"):
            assert content_hashes(tmp_path, kind) == content_hashes(finished.folder, kind)
    assert not list(tmp_path.glob("artifacts/.checkpoints/*/*"))


@pytest.mark.slow
def test_after_the_head_has_died_the_same_command_goes_on(finished: Run, tmp_path: Path) -> None:
    """On another cluster, for that one is gone with its head."""
    copy_artifacts(finished, "synthesis", tmp_path)
    first = EmulatedCluster()
    try:
        recipe = write_recipe(tmp_path, first.address, **LONGER["synthesis"])
        with driver(RUN_STAGE, "synthesis", recipe) as program:
            program.wait_for(lambda: len(list(tmp_path.glob("artifacts/unit/*/manifest.json"))) >= 2)
            first.kill_head()
            assert program.finish(timeout_s=180) != 0
    finally:
        first.close()
    units = content_hashes(tmp_path, "unit")
    assert len(units) >= 4
    second = EmulatedCluster()
    try:
        recipe = write_recipe(tmp_path, second.address, **LONGER["synthesis"])
        with driver(RUN_STAGE, "synthesis", recipe) as program:
            assert program.finish() == 0, program.text
    finally:
        second.close()
    assert units.items() <= content_hashes(tmp_path, "unit").items()
    assert len(list(tmp_path.glob("artifacts/unit/*/manifest.json"))) == 10
