"""Members on the storage: what is kept of a trained model, how it is read back, and whether it is still the same.

A member is an artifact: weights.safetensors, and a manifest with architecture, pruning, epoch, seed, class names, the
data's identity and the validation accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from teddy_ray.errors import InputError, Problem
from teddy_ray.models import MEAN, STD, Classifier, build, freeze
from teddy_ray.plan import Plan
from teddy_ray.pool import Labelled, measure
from teddy_ray.pool_plan import Member
from teddy_ray.pruning import prune, reshape, structure
from teddy_ray.storage import Storage

WEIGHTS = "weights.safetensors"
CHECK_IMAGES = 200
"""Validation images on which a member has to be as often right as its manifest says."""
TOLERANCE = 0.02
"""By how much it may differ: other devices round otherwise, and a few images lie on the border of two classes."""


def publish_member(
    storage: Storage,
    plan: Plan,
    member: Member,
    model: nn.Module,
    *,
    accuracy: float,
    check_accuracy: float,
    facts: Mapping[str, Any],
) -> None:
    """Publish a member with its accuracy on the validation part and on the rows of it that are checked later."""
    with storage.publish("member", member.fingerprint) as draft:
        draft.write_tensors(WEIGHTS, model.state_dict())
        draft.facts = {
            **facts,
            "name": member.name,
            "architecture": member.architecture,
            "ratio": member.ratio,
            "structure": structure(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "epoch": member.epoch,
            "seed": member.seed,
            "classes": list(plan.data.classes),
            "data": plan.data.train,
            "validation_accuracy": accuracy,
            "check_accuracy": check_accuracy,
        }


def load_members(plan: Plan, storage: Storage, members: Sequence[Member]) -> list[nn.Module]:
    """The members' models, frozen, in evaluation mode, on the CPU. Raises InputError where one has other classes."""
    return [freeze(load_member(plan, storage, member)) for member in members]


def load_member(plan: Plan, storage: Storage, member: Member) -> Classifier:
    """A member's model as it was published, on the CPU."""
    artifact = storage.open("member", member.fingerprint)
    check_classes(f"member {member.name}", artifact.manifest["classes"], plan.data.classes)
    model = build_for(plan, member.architecture, seed=member.seed)
    return reshape(model, artifact.manifest["structure"], artifact.tensors(WEIGHTS))


def build_for(plan: Plan, architecture: str, *, seed: int = 0) -> Classifier:
    """A model of an architecture for the plan's data, with weights drawn from the seed."""
    data = plan.recipe.data
    mean, std = normalisation(plan)
    return build(
        architecture,
        num_classes=len(plan.data.classes),
        channels=data.channels,
        image_size=data.image_size,
        seed=seed,
        mean=mean,
        std=std,
    )


def normalisation(plan: Plan) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Mean and standard deviation that the members' pixels are normalised by."""
    base = plan.recipe.pool.base
    return (base.mean, base.std) if base.weights is not None else (MEAN, STD)


def check_prunable(plan: Plan) -> None:
    """Raises InputError where a model cannot lose the channels that the recipe wants it to."""
    data, problems = plan.recipe.data, []
    for architecture, ratio in {(training.architecture, training.ratio) for training in plan.pool_plan.finetunings}:
        try:
            model = build_for(plan, architecture)
            prune(model, ratio, channels=data.channels, image_size=data.image_size)
        except ValueError as error:
            problems.append(Problem("pool.post.ratios", ratio, f"{architecture}: {error}"))
    if problems:
        raise InputError(problems)


def check_classes(key: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises InputError naming the outputs of a model that stand for other classes than the data's."""
    if list(found) == list(wanted):
        return
    if len(found) != len(wanted):
        remedy = f"should be the {len(wanted)} classes of the data, not {len(found)}"
        raise InputError([Problem(key, list(found[:10]), remedy)])
    differing = [
        f"output {index} is {ours!r}, in the data {theirs!r}"
        for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
        if ours != theirs
    ]
    more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
    remedy = "its outputs should be the data's classes in the same order (data.classes sets the data's order): "
    raise InputError([Problem(key, list(found[:10]), remedy + "; ".join(differing[:10]) + more)])


def check_member(plan: Plan, storage: Storage, member: Member, validation: Labelled, device: torch.device) -> None:
    """Raises InputError where a published member is not as often right as when it was published."""
    model = freeze(load_member(plan, storage, member)).to(device)
    accuracy = measure(model, validation, check_rows(len(validation.labels)), device)
    recorded = storage.open("member", member.fingerprint).manifest["check_accuracy"]
    num = len(check_rows(len(validation.labels)))
    tolerance = max(TOLERANCE, 1.5 / num)  # one image is never too many
    if not abs(accuracy - recorded) <= tolerance:
        remedy = (
            f"its manifest says {recorded:.4f} on the same {num} validation images; "
            f"more than {tolerance:.2f} apart. It was trained by other code or on another kind of machine: delete "
            f"{storage.display(f'artifacts/member/{member.fingerprint}')} to train it again"
        )
        raise InputError([Problem(f"member {member.name}, accuracy", round(accuracy, 4), remedy)])


def check_rows(num: int) -> npt.NDArray[np.intp]:
    """Which of so many validation images the check takes: evenly spread, for they may lie class by class."""
    return np.unique(np.linspace(0, num - 1, min(num, CHECK_IMAGES)).astype(np.intp))
