"""Predicted times against schedules done by hand, and what is said beside them."""

import json
import random
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from plans import DIGITS, FACTS, change

from teddy_ray.cli import main
from teddy_ray.errors import InputError
from teddy_ray.plan import STAGES, Plan
from teddy_ray.recipe_file import load_recipe
from teddy_ray.scaling import (
    RAY_START_S,
    REST,
    START_S,
    Rates,
    assumed,
    assumptions,
    dispatched_s,
    left,
    most_workers,
    predict,
    published,
    rates_for,
    worker_counts,
)
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary
from teddy_ray.tables import plan_table
from teddy_ray.work import flops_of_stages, forward_flops, phases

RECIPES = Path(__file__).parents[1] / "pipelines/recipes"
PASS = forward_flops("convnet:width=32", 10, 1, 8)
RATES = Rates(dict.fromkeys(STAGES, PASS * 100), pass_s=0.0, decode_s=0.0, origin=("rates: made up",))
"""A hundred passes a second."""
UNIT_S = 50 * 200 * 2 / 100


def plan_of(recipe=DIGITS, **overrides):
    for key, value in overrides.items():
        recipe = change(recipe, key.replace("__", "."), value)
    return Plan(recipe, FACTS)


def predicted(plan, workers, rates=RATES, **settings):
    return predict(plan, rates, workers, left(plan, ()), **settings)


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "workers", "start_s", "ends"),
    [
        ([4, 3, 2, 2], 1, 0, 11),
        ([4, 3, 2, 2], 2, 0, 6),  # 4 + 2 beside 3 + 2
        ([4, 3, 2, 2], 2, 1, 7),
        ([4, 3, 2, 2], 4, 1, 5),
        ([4, 3, 2, 2], 9, 1, 5),
        ([1, 1, 1, 9], 2, 0, 10),  # in the order of the plan, not the longest first
    ],
)
def test_items_are_handed_out_in_order_to_who_is_free(seconds, workers, start_s, ends):
    assert dispatched_s(list(enumerate(seconds)), workers, start_s) == ends


@pytest.mark.parametrize(
    ("jobs", "workers", "ends"),
    [
        ([("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 1), ("b", 1)], 4, 3),
        ([("a", 1), ("b", 5), ("a", 1), ("b", 5)], 2, 10),
        ([("a", 2)] * 5, 3, 10),
        ([("a", 1), ("b", 1), ("c", 1)] * 2, 3, 2),
    ],
)
def test_items_of_one_key_wait_for_each_other(jobs, workers, ends):
    assert dispatched_s(jobs, workers) == ends


def by_hand(seconds, workers):
    """Each goes to the worker that is free first."""
    free = [0.0] * workers
    for one in seconds:
        first = free.index(min(free))
        free[first] += one
    return max(free)


@pytest.mark.parametrize("seed", range(20))
def test_independent_items_end_when_a_plain_list_schedule_says(seed):
    rng = random.Random(seed)
    seconds = [rng.uniform(1, 9) for _ in range(rng.randint(1, 60))]
    for workers in (1, 2, 3, 7, 100):
        assert dispatched_s(list(enumerate(seconds)), workers) == pytest.approx(by_hand(seconds, workers))


@pytest.mark.parametrize("seed", range(10))
def test_no_schedule_beats_its_longest_chain_or_the_sum_shared_out(seed):
    rng = random.Random(seed)
    groups, slots = rng.randint(1, 12), rng.randint(1, 6)
    jobs = [(group, rng.uniform(1, 3)) for _ in range(slots) for group in range(groups)]
    chain = max(sum(seconds for key, seconds in jobs if key == group) for group in range(groups))
    total = sum(seconds for _, seconds in jobs)
    for workers in (1, 2, 5, 50):
        ends = dispatched_s(jobs, workers)
        assert max(chain, total / workers) - 1e-9 <= ends <= total + 1e-9
    assert dispatched_s(jobs, groups) == pytest.approx(chain)  # as many workers as groups: each keeps to its own


def test_more_workers_are_never_slower_with_equal_units():
    jobs = [(group, 1.0) for _ in range(5) for group in range(12)]
    ends = [dispatched_s(jobs, workers, 0.5) for workers in range(1, 20)]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] == 5.5  # twelve groups, five units each: more workers than groups do not help


def test_the_end_is_that_of_the_last_item_not_of_a_worker_that_came_too_late():
    assert dispatched_s([("a", 1), ("a", 1)], 5, 10) == 12


# -- predictions ---------------------------------------------------------------------------------------------------


def test_stages_of_the_digits_on_one_worker_and_two():
    one, two = (predicted(plan_of(), workers) for workers in (1, 2))
    assert one.wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + 2 * UNIT_S)
    assert two.wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + UNIT_S)
    assert one.wall_s["pool"] == pytest.approx(START_S["pool"] + 2 * 200 * 10 * 3 / 100)
    assert two.wall_s["pool"] == pytest.approx(START_S["pool"] + 200 * 10 * 3 / 100)
    assert one.busy_s == two.busy_s
    students = (15 * (300 * 100 * 3 + 30) + 3 * (30 * 200 * 3 + 30)) / 100
    controls = 4 * 100 * 100 * 10 / 100
    assert one.wall_s["evaluation"] == pytest.approx(START_S["labels"] + START_S["evaluation"] + controls + students)
    assert one.busy_s["evaluation"] == pytest.approx(controls + students)
    assert one.wall_s[REST] == RAY_START_S + 2 * 200_000 / 100e6
    assert one.hours_held == one.total_s / 3600
    assert two.hours_held == 2 * two.total_s / 3600


def test_moments_are_merged_by_no_more_tasks_than_workers():
    plan = plan_of()
    one, two = (predicted(plan, workers).wall_s["statistics"] for workers in (1, 2))
    merged = 1 * 10 * 10 * (3 * 32) * 16 / 100e6  # chunks, classes, members, channels, bytes
    assert one == pytest.approx(START_S["statistics"] + 200 * 10 / 100 + merged)
    assert one - two == pytest.approx(merged / 2)


def test_a_shared_training_needs_its_workers_and_is_so_much_faster():
    plan = plan_of(pool__workers_per_base=2)
    assert predicted(plan, 1) is None
    alone = 200 * 10 * 3 / 100
    assert predicted(plan, 3).wall_s["pool"] == pytest.approx(START_S["pool"] + 2 * alone / 2)
    assert predicted(plan, 4).wall_s["pool"] == pytest.approx(START_S["pool"] + alone / 2)
    assert predicted(plan, 4).busy_s["pool"] == pytest.approx(2 * alone)


def test_sharing_a_training_does_not_share_the_launches():
    launches = replace(RATES, pass_s=10.0)
    passes = 10 * 4 * 3  # batches of 64 of 200 images
    found = predicted(plan_of(pool__workers_per_base=2), 4, launches)
    assert found.wall_s["pool"] == pytest.approx(START_S["pool"] + passes * 10)
    assert found.busy_s["pool"] == pytest.approx(2 * 2 * passes * 10)


def test_fine_tunings_begin_when_all_bases_are_done():
    plan = plan_of(pool__generation="post", pool__seeds=(0,))
    alone = 200 * 3 / 100
    tuned = alone * (1 + 0.64 + 0.36)
    assert predicted(plan, 1).wall_s["pool"] == pytest.approx(2 * START_S["pool"] + 10 * alone + tuned)
    assert predicted(plan, 9).wall_s["pool"] == pytest.approx(2 * START_S["pool"] + 10 * alone + alone)


def test_no_more_workers_than_the_recipe_asks_for():
    plan = plan_of(synthesis__num_workers=1)
    assert predicted(plan, 8).wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + 2 * UNIT_S)
    assert "units 1, synthesis.num_workers" in "\n".join(assumptions(plan, RATES, left(plan, ())))


def test_workers_that_share_the_cores_of_one_machine_are_slower():
    plan = plan_of()
    alone, shared = predicted(plan, 2), predicted(plan, 2, cores=1)
    for stage in ("synthesis", "labels"):
        factor = 2 if stage == "synthesis" else 1  # one file of labels: one worker
        assert shared.wall_s[stage] == pytest.approx(factor * alone.wall_s[stage])
    assert predicted(plan, 2, cores=2) == alone


def test_decoding_and_launches_are_a_floor():
    slow = replace(RATES, decode_s=1.0)
    plan = plan_of()
    assert predicted(plan, 2, slow).wall_s["pool"] == pytest.approx(START_S["pool"] + 200)
    assert predicted(plan, 1, slow).busy_s["statistics"] == 200
    threads = plan_of(statistics__decoders=4)
    assert predicted(threads, 1, slow).busy_s["statistics"] == 50
    launches = replace(RATES, pass_s=10.0)
    assert predicted(plan, 2, launches).wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + 400 * 10)


def test_what_is_there_takes_no_time(tmp_path):
    plan, storage = plan_of(), Storage(str(tmp_path))
    first = next(plan.units())
    for kind, fingerprint in (("unit", first.fingerprint), ("pool", plan.pool)):
        with storage.publish(kind, fingerprint) as draft:
            draft.facts = {}
    work = left(plan, published(plan, storage))
    assert "pool" not in {phase.stage for phase in work}
    one = predict(plan, RATES, 1, work)
    assert one.wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + UNIT_S)
    assert one.wall_s["pool"] == 0
    assert left(plan, set(plan.stages().values())) == ()


def test_columns_end_where_more_workers_do_not_help():
    plan = plan_of()
    assert worker_counts(plan, left(plan, ())) == (1, 8, 18)
    few = plan_of(evaluation__num_workers=2, labels__num_workers=1)
    assert worker_counts(few, left(few, ())) == (1, 2)
    shared = plan_of(pool__workers_per_base=4)
    assert worker_counts(shared, left(shared, ())) == (4, 8, 18)
    many = plan_of(evaluation__seeds=tuple(range(1000)))
    assert worker_counts(many, left(many, ())) == (1, 8, 64, 512)


# -- rates ---------------------------------------------------------------------------------------------------------


def write_run(storage, name, plan, seconds):
    stages = {stage: {"worker_seconds": seconds} for stage in STAGES}
    summary = {field.name: None for field in fields(Summary)}
    summary |= {"name": name, "device": "a slow machine", "stages": stages, "flops": flops_of_stages(plan)}
    storage.write(f"runs/{name}/summary.json", json.dumps(summary).encode())


def test_rates_are_those_of_the_last_run_of_the_name_or_of_the_run_that_is_told(tmp_path):
    plan, storage = plan_of(), Storage(str(tmp_path))
    write_run(storage, "digits", plan, 100.0)
    write_run(storage, "trial", plan, 10.0)
    rates = rates_for(plan, storage)
    assert rates.flops["synthesis"] == pytest.approx(100 * 200 * 2 * PASS / 100)
    assert predicted(plan, 1, rates).busy_s["synthesis"] == pytest.approx(100)
    assert rates.origin[0].startswith("rates: measured by the run digits (a slow machine), GFLOP/s per worker: pool ")
    assert rates.origin[1].startswith("that run did 1 times the operations of this whole plan; its reading, decoding")
    larger = plan_of(synthesis__steps=400, pool__snapshots=(20,), labels__views=200, evaluation__epochs=600)
    assert "that run did 0.5" in rates_for(larger, storage).origin[1]
    assert predicted(plan, 1, rates_for(plan, storage, run="trial")).busy_s["pool"] == pytest.approx(10)
    assert rates_for(plan, storage, teraflops=2).flops["pool"] == 2e12
    assert (rates.pass_s, rates.decode_s) == (0, 0)


def test_a_run_that_is_not_there_is_an_error_where_it_was_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"--rates: found 'trial'; should be the name of a finished run;"):
        rates_for(plan_of(), Storage(str(tmp_path)), run="trial")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({field.name: {} for field in fields(Summary)}).encode(),
        b"",
        b"3",
        b"[]",
        b"{}",
        b'{"name": "digits", "device": "", "flops": {}}',
        b'{"name": "digits", "stages": {}}',
    ],
)
def test_a_summary_of_another_version_or_that_is_none_counts_as_no_run(tmp_path, text):
    storage = Storage(str(tmp_path))
    storage.write("runs/digits/summary.json", text)
    assert "ASSUMED (uncalibrated: no run named digits" in rates_for(plan_of(), storage).origin[0]
    with pytest.raises(InputError, match=r"--rates: found 'digits'; should be the name of a finished run"):
        rates_for(plan_of(), storage, run="digits")


def test_a_stage_that_the_run_did_not_measure_is_assumed_and_named(tmp_path):
    plan, storage = plan_of(), Storage(str(tmp_path))
    buffers = plan_of(statistics__scope="global", statistics__source="buffers")
    write_run(storage, "digits", buffers, 100.0)
    rates = rates_for(plan, storage)
    assert rates.flops["statistics"] == 0.05e12
    assert "it did no statistics: 0.05 TFLOP/s per CPU thread ASSUMED" in rates.origin
    assert not any("it did no" in line for line in rates_for(buffers, storage).origin)


def test_what_is_assumed_goes_by_threads_and_shares_of_a_gpu():
    rates = assumed(plan_of(synthesis__gpus_per_worker=0.5, labels__threads=4))
    assert rates.flops["synthesis"] == 5e12
    assert rates.flops["labels"] == 0.2e12
    assert "rates: 10 TFLOP/s per GPU and 0.05 TFLOP/s per CPU thread, and 2 ms" in rates.origin[0]
    assert "ASSUMED (uncalibrated: no run named digits is in this storage). To measure: run the" in rates.origin[0]
    told = assumed(plan_of(), 3)
    assert "3 TFLOP/s per CPU thread, and 2 ms per pass of a batch at least, ASSUMED (as --teraflops" in told.origin[0]


# -- what is printed -----------------------------------------------------------------------------------------------


def test_the_table_of_a_plan(tmp_path):
    plan = Plan(DIGITS, replace(FACTS, num_validation=1234))
    text = plan_table(plan, Storage(str(tmp_path)), workers=(1, 2))
    assert "digits: 10 classes; 200 training, 1,234 validation and 30 test images" in text
    assert "10 members of 2 bases and 0 fine-tunings" in text
    assert "students; labels of controls: 400,000 images x views x members" in text
    assert re.search(r"^predicted time +1 worker +2 workers$", text, re.M)
    assert re.search(r"^synthesis +8 s +7 s$", text, re.M)  # 400 passes of 2 ms a unit
    assert re.search(r"^worker hours held +\d", text, re.M)
    assert text.count("to compute") == 5
    last = text.splitlines()[-1]
    assert last.startswith("- cost = worker hours x the price of a worker")


def test_one_is_one_unit(tmp_path):
    plan = plan_of(synthesis__classes_per_unit=10, pool__seeds=(0,), pool__snapshots=(1,))
    text = plan_table(plan, Storage(str(tmp_path)))
    assert "100 images in 1 unit of at most" in text
    assert "1 member of 1 base and 0 fine-tunings" in text


def test_too_few_workers_are_said_to_be_so(tmp_path):
    text = plan_table(plan_of(pool__workers_per_base=2), Storage(str(tmp_path)), workers=(1, 2))
    assert re.search(r"^total +- +\d", text, re.M)
    assert "- -: a training takes 2 workers (pool.workers_per_base)" in text
    assert "- 2 workers share a training at no cost: the exchange of gradients is not counted" in text


def test_where_everything_is_there_no_time_is_predicted(tmp_path):
    plan, storage = plan_of(), Storage(str(tmp_path))
    for stage, fingerprint in plan.stages().items():
        with storage.publish(stage, fingerprint) as draft:
            draft.facts = {}
    text = plan_table(plan, storage)
    assert text.endswith("Nothing is left to compute.")
    assert text.count("reused") == 5


def test_a_stage_whose_pieces_are_there_is_only_published(tmp_path):
    plan, storage = plan_of(), Storage(str(tmp_path))
    for unit in plan.units():
        with storage.publish("unit", unit.fingerprint) as draft:
            draft.facts = {}
    text = plan_table(plan, storage)
    assert re.search(r"^synthesis +\w+ +to publish", text, re.M)
    assert text.count("to compute") == 4
    assert "units" not in next(line for line in text.splitlines() if line.startswith("- most workers"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workers", "0"], "'0' should be whole numbers from 1"),
        (["--workers", "1,many"], "'1,many' should be whole numbers from 1"),
        (["--teraflops", "0"], "'0' should be a number above 0"),
        (["--teraflops", "1", "--rates", "trial"], "not allowed with"),
    ],
)
def test_flags_that_make_no_sense(flags, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(RECIPES / "digits.yaml"), *flags])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("command", "resumes"), [("plan", False), ("distill", True)])
def test_only_what_can_go_on_says_that_it_resumes(command, resumes, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("teddy_ray.cli.load_recipe", interrupted)
    assert main([command, "some.yaml"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("\nInterrupted.")
    assert ("resumes" in said) == resumes


# -- ImageNet-1k ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet():
    names = tuple(f"class {label:03d}" for label in range(1000))
    facts = replace(FACTS, classes=names, counts=(1255,) * 1000, num_test=50_000, num_validation=25_000)
    return Plan(load_recipe(RECIPES / "imagenet1k.yaml"), facts)


def test_the_recipe_for_imagenet_is_cut_for_a_hundred_gpus(imagenet):
    limits = {phase.what: most_workers(imagenet, phase) for phase in phases(imagenet) if phase.jobs}
    assert limits == {
        "bases": 16,
        "chunks": 64,
        "units": 100,
        "files": 100,
        "files of controls": 400,
        "students": 12,
    }


def test_the_trial_and_the_other_commands_of_its_header_are_recipes():
    header = [line for line in (RECIPES / "imagenet1k.yaml").read_text().splitlines() if line.startswith("#")]
    overrides = re.findall(r"--set (\S+)", "\n".join(header))
    assert len(overrides) >= 10
    recipe = load_recipe(RECIPES / "imagenet1k.yaml", overrides[:-1])
    assert (recipe.name, recipe.synthesis.images_per_class, recipe.evaluation.seeds) == ("trial", 10, (0,))


def test_imagenet_is_predicted_for_512_gpus_without_its_data(imagenet):
    work, rates = left(imagenet, ()), assumed(imagenet)
    few, many = (predict(imagenet, rates, workers, work) for workers in (64, 512))
    each = 100 * 1000 * 2 * forward_flops("torchvision/resnet18", 1000, 3, 224) / 10e12
    assert few.wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + 2 * each)
    assert many.wall_s["synthesis"] == pytest.approx(START_S["synthesis"] + each)
    assert many.total_s < few.total_s
    assert few.busy_s == many.busy_s
