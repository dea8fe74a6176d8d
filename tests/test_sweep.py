"""Sweeps on Ray Tune: what trials share, what they measure, and what a sweep leaves behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import STAGES, content_hashes, processes, tiny
from emulated import EmulatedCluster, driver

from teddy_ray import flow
from teddy_ray.cli import main
from teddy_ray.errors import InputError
from teddy_ray.progress import Progress
from teddy_ray.recipe import Cluster, Recipe
from teddy_ray.recipe_file import dump_recipe, load_recipe
from teddy_ray.sweeps import hub
from teddy_ray.sweeps.checked import in_order, prepare, preview
from teddy_ray.sweeps.hub import Hub, Look, Shared
from teddy_ray.sweeps.sweep import sweep
from teddy_ray.sweeps.tuning import Watcher, rungs_of

IPC, WEIGHT = "synthesis.images_per_class", "synthesis.ce_weight"
SPACE = {IPC: {"grid": [2, 4]}, "pool.generation": {"grid": ["prior", "post"]}}


def swept(folder: Path, space: dict[str, Any] = SPACE, workers: int | str = 1, **sweep_part: Any) -> Recipe:
    """workers: of each stage."""
    return tiny(
        folder,
        sweep={"space": space, **sweep_part},
        pool__seeds=[0],
        pool__post={"ratios": [0.0]},
        synthesis__classes_per_unit=10,
        synthesis__steps=10,
        evaluation__controls=["random_soft"],
        **{f"{stage}__num_workers": workers for stage in STAGES},
    )


def quiet() -> Progress:
    return Progress(open(os.devnull, "w"))


# -- who makes what ----------------------------------------------------------------------------------------------------


def test_two_trials_that_need_the_same_artifacts_make_each_once(shared_ray: None) -> None:
    """One begins while the other is at it; each makes what the other has not in hand, and waits for the rest."""
    shelf: list[str] = []
    makers: dict[str, list[str]] = {"one": [], "two": []}
    begun = threading.Event()
    common = Hub.open()

    def run(trial: str, wanted: list[str]) -> None:
        for mine in Shared(common, trial).turns("unit", lambda: [each for each in wanted if each not in shelf]):
            begun.set()
            time.sleep(0.3)
            makers[trial] += mine
            shelf.extend(mine)
        assert set(wanted) <= set(shelf)

    first = threading.Thread(target=run, args=("one", ["a", "b"]))
    first.start()
    begun.wait()
    second = threading.Thread(target=run, args=("two", ["b", "c", "a"]))
    second.start()
    first.join()
    second.join()
    assert makers == {"one": ["a", "b"], "two": ["c"]}
    assert common.look().made == {"unit/a": 1, "unit/b": 1, "unit/c": 1}


def test_what_a_trial_had_claimed_is_free_when_it_is_lost() -> None:
    actor = hub._Hub()
    for trial in ("one", "two", "three"):
        actor.begin(trial)
    assert actor.take("one", ["unit/a", "unit/b"]) == ["unit/a", "unit/b"]
    assert actor.take("two", ["unit/b", "unit/c"]) == ["unit/c"]
    actor.forget("one")
    assert actor.take("one", ["unit/a"]) == []  # stopped, but not ended yet
    assert actor.take("two", ["unit/a", "unit/b"]) == ["unit/a", "unit/b"]
    actor.release("one", ["unit/a"], [])  # its last word comes late
    assert actor.take("three", ["unit/a"]) == []


def test_trials_that_wait_for_others_leave_them_the_workers() -> None:
    actor = hub._Hub()
    actor.begin("one")
    actor.begin("two")
    actor.take("one", ["pool/a"])
    assert actor.num_at_work() == 2
    actor.take("two", ["pool/a"])
    assert actor.num_at_work() == 1
    actor.release("one", ["pool/a"], ["pool/a"])
    actor.take("two", ["unit/a"])
    assert actor.num_at_work() == 2
    actor.forget("one")
    assert actor.num_at_work() == 1


def test_an_error_frees_what_was_claimed_and_counts_nothing(shared_ray: None) -> None:
    common = Hub.open()
    with contextlib.suppress(RuntimeError):
        for _ in Shared(common, "one").turns("unit", lambda: ["a"]):
            raise RuntimeError
    assert next(iter(Shared(common, "two").turns("unit", lambda: ["a"]))) == ["a"]
    assert common.look().made == {}


def test_trials_of_different_pools_begin_first(tmp_path: Path) -> None:
    checked = prepare(swept(tmp_path), quiet())
    assert [len({checked.plans[number].pool for number in in_order(checked.plans)[:num]}) for num in (1, 2, 4)] == [
        1,
        2,
        2,
    ]
    assert sorted(in_order(checked.plans)) == [1, 2, 3, 4]


def test_whoever_waits_for_a_trial_takes_no_torch() -> None:
    """600 MB for each trial at a time."""
    script = "import sys, teddy_ray.sweeps.trainable, teddy_ray.sweeps.trial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_rungs_are_those_of_successive_halving(tmp_path: Path) -> None:
    recipe = swept(tmp_path, stopping={"grace_epochs": 2, "reduction": 3})
    for epochs, rungs in ((3, (2,)), (6, (2,)), (7, (2, 6)), (300, (2, 6, 18, 54, 162))):
        part = recipe.evaluation.model_copy(update={"epochs": epochs})
        assert rungs_of(recipe.model_copy(update={"evaluation": part})) == rungs
    assert rungs_of(swept(tmp_path)) == ()


def test_the_time_left_is_told_by_whole_trials_after_the_first_wave() -> None:
    told = []
    bar: Any = SimpleNamespace(update=lambda done, note, paced: told.append((done, paced)))
    job: Any = SimpleNamespace(hub=SimpleNamespace(look=lambda: Look([], {"running": (0.5, "")}, {})))
    watcher: Any = Watcher(job, quiet(), bar, 1, iter(()), print, print, print)
    watcher._numbers = {"running": 9}
    for over, running in [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1)]:
        watcher._over, watcher._running = set(range(over)), dict.fromkeys(range(running))
        watcher.show()
    assert told == [(1.5, 0), (2.5, 1), (3.5, 1), (4.5, 3), (5.5, 4)]


def test_problems_of_trials_are_told_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare(swept(tmp_path, {IPC: {"grid": [2, 50, 60]}, WEIGHT: {"grid": [0.1, -1.0]}}), quiet())
    weight, *sizes = (str(problem) for problem in caught.value.problems)
    assert weight == "synthesis.ce_weight: found -1.0; should be greater than or equal to 0 (in 3 of 6 trials)"
    assert [size.split(";")[0] for size in sizes] == [f"{IPC}: found 50", f"{IPC}: found 60"]
    assert all(size.endswith("(in 1 of 6 trials)") for size in sizes)
    assert not list(tmp_path.iterdir())


# -- whole sweeps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept_once(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A sweep over images per class and generation. Tests read it."""
    folder = tmp_path_factory.mktemp("sweep")
    with open(folder / "progress.txt", "w+") as stream:
        text, failed = sweep(swept(folder), Progress(stream))
        assert failed == {}
        stream.seek(0)
        return folder, text, stream.read()


def tree_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / "tiny" / "sweep.json").read_text())
    return found


def test_as_many_trials_run_at_a_time_as_workers_fit(swept_once: tuple[Path, str, str]) -> None:
    """Four, each of which asks for one."""
    _, _, progress = swept_once
    assert progress[: progress.index(" finished: ")].count(" begins: ") == 4


def test_every_artifact_is_made_once(swept_once: tuple[Path, str, str]) -> None:
    """The smaller sets are the beginnings of the larger ones; prior and post pool have their base in common."""
    folder, _, _ = swept_once
    made = tree_of(folder)["made"]
    assert all(facts["times"] == facts["artifacts"] for facts in made.values()), made
    expected = {"training": 2, "pool": 2, "statistics": 2, "unit": 4, "synthesis": 4, "labels": 4, "student": 8}
    assert {kind: made[kind]["times"] for kind in expected} == expected


def test_trials_are_measured_on_the_validation_part_and_the_winner_on_test(swept_once: tuple[Path, str, str]) -> None:
    folder, text, progress = swept_once
    manifests = [json.loads(path.read_text()) for path in folder.glob("artifacts/evaluation/*/manifest.json")]
    splits = [{score["split"] for score in manifest["scores"]} for manifest in manifests]
    assert sorted(splits, key=str) == [{"test"}, *[{"validation"}] * 4]
    tree = tree_of(folder)
    best = max(tree["trials"], key=lambda each: each["metrics"]["accuracy"])
    assert tree["winner"]["validation"] == best["metrics"]["accuracy"]
    assert [each["state"] for each in tree["trials"]] == ["finished"] * 4
    assert f"Trial {tree['winner']['number']} wins by accuracy" in text
    assert progress.count("finished: validation accuracy") == 4
    assert tree["measured_on_test"] == [{"settings": tree["winner"]["settings"], "accuracy": tree["winner"]["test"]}]


def test_plan_counts_what_the_trials_of_a_sweep_share(
    swept_once: tuple[Path, str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = swept_once
    (tmp_path / "recipe.yaml").write_bytes(dump_recipe(swept(folder)).encode())
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert capfd.readouterr().out.endswith(
        "4 trials, 4 of them over; all together: 2 pools, 2 statistics, 4 labelled sets, 4 units, 8 students\n"
    )
    assert preview(swept(tmp_path), quiet()).startswith("sweep: 4 trials, 0 of them over; ")


@pytest.mark.slow
def test_the_winner_s_recipe_gives_its_validation_accuracy_again(
    swept_once: tuple[Path, str, str], tmp_path: Path
) -> None:
    """From nothing: on another storage."""
    folder, _, _ = swept_once
    recipe = load_recipe(folder / "runs" / "tiny" / "winner.yaml", [], {"storage": str(tmp_path)})
    assert flow.distill(recipe, quiet()).accuracy["distilled"].validation == tree_of(folder)["winner"]["validation"]


def test_a_finished_sweep_computes_nothing_again(
    swept_once: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text, _ = swept_once
    monkeypatch.setattr("teddy_ray.sweeps.sweep._run", None)
    monkeypatch.setattr("teddy_ray.flow._run", None)
    again, _ = sweep(swept(folder), quiet())
    assert again == text


def test_a_sweep_that_is_interrupted_before_its_first_trial_is_over_goes_on(
    swept_once: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of other sweeps are in its ledger by then."""
    folder, _, _ = swept_once
    shutil.copytree(folder / "artifacts", tmp_path / "artifacts")
    wider = swept(tmp_path, SPACE | {IPC: {"grid": [1, 2, 4]}})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("teddy_ray.sweeps.sweep._run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(wider, quiet())
    assert sorted(prepare(wider, quiet()).done) == [3, 4, 5, 6]
    assert len(tree_of(tmp_path)["trials"]) == 4
    assert "4 of 6 trials" in (tmp_path / "runs" / "tiny" / "report.html").read_text()


def test_trials_that_are_added_are_all_that_runs(swept_once: tuple[Path, str, str], tmp_path: Path) -> None:
    """By what stands in the ledger: the artifacts are elsewhere."""
    folder, _, _ = swept_once
    more = prepare(swept(folder, {IPC: {"grid": [1, 2, 4]}, "pool.generation": {"grid": ["prior", "post"]}}), quiet())
    assert sorted(more.done) == [3, 4, 5, 6]
    assert more.identity == prepare(swept(folder), quiet()).identity
    assert [reading.accuracy for reading in more.measured] == [tree_of(folder)["winner"]["test"]]
    other = prepare(swept(folder).model_copy(update={"seed": 1}), quiet())
    assert (other.done, other.measured) == ({}, [])
    assert other.identity != more.identity


@pytest.mark.slow
def test_a_killed_trial_begins_again_and_time_runs_out(
    shared_ray: None, tmp_path: Path, killer: Callable[[str, int], list[int]]
) -> None:
    """From its artifacts. TensorBoard's files are kept of every trial."""
    space = {WEIGHT: {"grid": [0.1, 1.0]}}
    killed = killer("ray::_run_trial", 1)
    with open(tmp_path / "progress.txt", "w+") as stream:
        text, failed = sweep(swept(tmp_path, space, trackers={"tensorboard": True}), Progress(stream))
        stream.seek(0)
        assert "lost, begins again from its artifacts" in stream.read()
    assert len(killed) == 1
    assert failed == {}
    assert "2 of 2 trials finished" in text
    events = {path.parent.name for path in tmp_path.glob("runs/tiny/tensorboard/*/events.out.tfevents.*")}
    assert events == {"trial-1", "trial-2"}
    more = {WEIGHT: {"grid": [0.1, 1.0, 2.0]}, "seed": {"grid": [0, 1]}}
    text, failed = sweep(swept(tmp_path, more, seconds=1.0), quiet())
    assert failed == {}
    assert processes("ray::_run_trial") == []
    assert "2 of 6 trials finished" in text  # the two from above, by their artifacts


@pytest.mark.slow
def test_optuna_and_early_stopping_and_a_trial_that_fails(shared_ray: None, tmp_path: Path) -> None:
    """Draws that go on where a first sweep ended; a rate of 1e6 is a failure of its trial alone."""
    space = {"synthesis.learning_rate": {"choice": [0.01, 0.1]}, WEIGHT: {"log_uniform": [0.01, 1.0]}}
    part = {"sampler": "optuna", "stopping": {"grace_epochs": 1, "reduction": 2}, "at_once": 2}
    sweep(swept(tmp_path, space, trials=4, **part), quiet())
    before = tree_of(tmp_path)
    assert len(before["trials"]) == 4
    states = {each["state"] for each in before["trials"]}
    assert "finished" in states
    trained = before["student_epochs"]
    assert trained["trained"] <= trained["without_stopping"]
    sweep(swept(tmp_path, space, trials=6, **part), quiet())
    after = tree_of(tmp_path)
    settings = [json.dumps(each["settings"]) for each in after["trials"]]
    assert len(set(settings)) == 6
    assert {json.dumps(each["settings"]) for each in before["trials"]} <= set(settings)


def check_is_that_of(folder: Path, undisturbed: Path) -> None:
    """The same as that of a sweep that nobody disturbed."""
    ours, theirs = tree_of(folder), tree_of(undisturbed)
    assert [each["metrics"]["accuracy"] for each in ours["trials"]] == [
        each["metrics"]["accuracy"] for each in theirs["trials"]
    ]
    assert (ours["winner"], ours["front"]) == (theirs["winner"], theirs["front"])
    for kind in ("unit", "shard", "moments"):
        assert content_hashes(folder, kind) == content_hashes(undisturbed, kind)
    name = "runs/tiny/winner.yaml"
    one, two = (yaml.safe_load((each / name).read_text()) for each in (folder, undisturbed))
    for recipe in (one, two):
        recipe |= {"storage": None, "cluster": None, **{stage: recipe[stage] | {"num_workers": 1} for stage in STAGES}}
    assert one == two


SCRIPT = str(Path(__file__).parent.parent / "pipelines" / "sweep.py")


@pytest.mark.slow
def test_a_driver_killed_in_mid_sweep_is_resumed(swept_once: tuple[Path, str, str], tmp_path: Path) -> None:
    """Finished trials are not begun again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(swept(tmp_path, workers="auto")))
    with driver(SCRIPT, str(recipe)) as program:
        program.wait_for(lambda: len(list(tmp_path.glob("runs/tiny/trials/*.json"))) >= 1)
        os.kill(program.process.pid, signal.SIGKILL)
    done = {path.name: path.read_bytes() for path in tmp_path.glob("runs/tiny/trials/*.json")}
    assert 1 <= len(done) < 4
    with driver(SCRIPT, str(recipe)) as program:
        assert program.finish() == 0, program.text
    assert f"4 trials, {len(done)} of them over" in program.text
    assert program.text.count(" begins: ") == 4 - len(done)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("runs/tiny/trials/*.json")}.items() >= done.items()
    check_is_that_of(tmp_path, swept_once[0])


@pytest.mark.slow
def test_nodes_lost_in_mid_sweep_change_nothing(swept_once: tuple[Path, str, str], tmp_path: Path) -> None:
    """Two of three, one after another, with what trials and their workers had in hand; one joins for each."""
    cluster = EmulatedCluster()
    try:
        recipe = tmp_path / "recipe.yaml"
        there = {"cluster": Cluster(address=cluster.address)}
        recipe.write_text(dump_recipe(swept(tmp_path, workers="auto").model_copy(update=there)))
        with driver(SCRIPT, str(recipe)) as program:
            for kind in ("member", "student"):
                program.wait_for(lambda kind=kind: any(tmp_path.glob(f"artifacts/{kind}/*/manifest.json")))
                cluster.kill(cluster.nodes[0])
                cluster.add()
            assert program.finish() == 0, program.text
    finally:
        cluster.close()
    assert program.text.count("node(s) lost") >= 1, program.text
    check_is_that_of(tmp_path, swept_once[0])
