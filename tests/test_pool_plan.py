"""Which trainings a pool needs, and which of their models are its members."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import tiny

from teddy_ray.pool_plan import DataFacts, Given, PoolPlan

FACTS = DataFacts(
    classes=tuple("abcdefghij"), counts=(20,) * 10, num_test=30, train="train", validation="validation", test="test"
)


def pool_plan(given: Given | None = None, code: dict[str, str] | None = None, **pool: Any) -> PoolPlan:
    recipe = tiny(__file__, **{f"pool__{key}": value for key, value in pool.items()})  # type: ignore[arg-type]
    return PoolPlan(recipe, FACTS, given, code or {})


def test_a_prior_pool_is_every_snapshot_of_every_base() -> None:
    plan = pool_plan(architectures=["convnet", "resnet18"], seeds=[0, 1], snapshots=[1, 3])
    assert [member.name for member in plan.members] == [
        f"{architecture}/seed{seed}/epoch{epoch}"
        for architecture in ("convnet", "resnet18")
        for seed in (0, 1)
        for epoch in (1, 3)
    ]
    assert [training.epochs for training in plan.bases] == [3, 3, 3, 3]
    assert plan.finetunings == ()
    assert len({member.fingerprint for member in plan.members}) == 8


def test_a_post_pool_is_a_pruned_copy_of_the_last_snapshot_for_every_ratio() -> None:
    post = {"ratios": [0.0, 0.3, 0.3], "epochs": 2, "learning_rate": 1e-3}
    plan = pool_plan(generation="post", seeds=[0, 1], snapshots=[1, 3], post=post)
    assert [[member.epoch for member in base.members] for base in plan.bases] == [[1, 3], [1, 3]]
    assert [(training.start, training.ratio) for training in plan.finetunings] == [
        (base.members[-1], ratio) for base in plan.bases for ratio in (0.0, 0.3, 0.3)
    ]
    assert plan.members == tuple(training.members[0] for training in plan.finetunings)
    assert {training.learning_rate for training in plan.finetunings} == {1e-3}
    assert [member.seed for member in plan.members] == [0, 1, 2, 0, 1, 2]
    assert len({member.fingerprint for member in plan.members}) == 6


def test_a_post_pool_prunes_the_very_base_that_a_prior_pool_trains() -> None:
    prior, post = pool_plan(snapshots=[1, 3]), pool_plan(generation="post", snapshots=[1, 3])
    assert post.bases == prior.bases
    assert {one.start for one in post.finetunings} == {base.members[-1] for base in prior.bases}


def test_a_further_snapshot_seed_or_ratio_keeps_what_is_there() -> None:
    few, more = pool_plan(snapshots=[1, 3]), pool_plan(snapshots=[1, 2, 3], seeds=[0, 1, 2])
    assert set(few.members) < set(more.members)
    assert {base.fingerprint for base in few.bases} < {base.fingerprint for base in more.bases}
    few, more = (pool_plan(generation="post", seeds=[0, 1], post={"ratios": ratios}) for ratios in ([0.1], [0.1, 0.2]))
    assert set(few.members) < set(more.members)


def test_another_place_among_the_ratios_is_another_draw() -> None:
    """Whatever the seeds: all draws of a fine-tuning follow its name."""
    some = pool_plan(generation="post", seeds=[0, 1], post={"ratios": [0.0, 0.4]}).members
    others = pool_plan(generation="post", seeds=[0, 1], post={"ratios": [0.4, 0.2, 0.1]}).members
    assert not {member.fingerprint for member in some} & {member.fingerprint for member in others}


def test_another_end_of_training_is_another_course() -> None:
    assert not set(pool_plan(snapshots=[1, 3]).members) & set(pool_plan(snapshots=[1, 4]).members)


@pytest.mark.parametrize("generation", ["prior", "post"])
def test_a_given_base_is_where_all_begins(generation: str) -> None:
    plan = pool_plan(Given("hash"), generation=generation, seeds=[0, 1])
    assert plan.given_base is not None
    trainings = plan.bases if generation == "prior" else plan.finetunings
    assert (plan.bases == ()) is (generation == "post")
    assert {training.start for training in trainings} == {plan.given_base}
    other = pool_plan(Given("other hash"), generation=generation, seeds=[0, 1])
    assert not set(plan.members) & set(other.members)
    assert (
        len({member.fingerprint for member in plan.members}) == len(plan.members) == {"prior": 4, "post": 6}[generation]
    )


def test_how_often_a_given_base_is_right_changes_nothing_but_the_generation() -> None:
    plan = pool_plan(Given("hash", 0.3), generation="prior")
    assert plan.fingerprint == replace(plan, given=Given("hash")).fingerprint


@pytest.mark.parametrize(
    ("accuracy", "well_trained", "generation", "reason"),
    [
        (0.6, 0.5, "post", "accuracy of 0.6000 is 56% of the way from chance, 0.1000, to perfect; well trained is 50%"),
        (0.54, 0.5, "prior", "accuracy of 0.5400 is 49% of the way"),
        (0.55, 0.5, "post", "is 50% of the way"),
        (0.9, 0.95, "prior", "well trained is 95% or more"),
    ],
)
def test_auto_follows_the_accuracy_of_the_given_base(
    accuracy: float, well_trained: float, generation: str, reason: str
) -> None:
    plan = pool_plan(Given("hash", accuracy), generation="auto", base={"weights": "file", "well_trained": well_trained})
    assert plan.generation == generation
    assert reason in plan.generation_reason
    same = pool_plan(Given("hash"), generation=generation)
    assert plan.fingerprint == same.fingerprint  # it is the pool that one could have asked for


def test_auto_without_a_base_is_prior() -> None:
    plan = pool_plan(generation="auto")
    assert (plan.generation, plan.generation_reason) == ("prior", "no base is given, and a random one is early")


def test_a_user_function_that_changed_trains_anew() -> None:
    before, after = (pool_plan(code={"convnet:width=32": code}) for code in ("one", "two"))
    assert not set(before.members) & set(after.members)


def test_recalibration_shares_the_training() -> None:
    plain, recalibrated = pool_plan(), pool_plan(recalibrate=True)
    assert not set(plain.members) & set(recalibrated.members)
    assert [base.fingerprint for base in plain.bases] == [base.fingerprint for base in recalibrated.bases]
    post = [pool_plan(generation="post", recalibrate=value) for value in (False, True)]
    assert post[0].bases == post[1].bases  # what is pruned stays as training left it
    assert not set(post[0].members) & set(post[1].members)
