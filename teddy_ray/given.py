"""`pool.base`: a model of the user's, checked before anything runs, and published as what trainings start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from teddy_ray.errors import InputError, Problem
from teddy_ray.members import build_for, check_classes, publish_member
from teddy_ray.models import Classifier, freeze
from teddy_ray.plan import Plan
from teddy_ray.pool import Labelled, measure
from teddy_ray.pool_plan import Given
from teddy_ray.recipe import GivenBase as BasePart
from teddy_ray.sources import Images
from teddy_ray.storage import Storage
from teddy_ray.weights import Weights, load_into, read_weights

KEY = "pool.base.weights"

GIVEN_IMAGES = 1000
"""Validation images, at most, on which a given base is measured: this happens on the driver, before Ray starts."""


@dataclass(frozen=True)
class GivenBase:
    """What was read. model: None where it is published already."""

    facts: Given
    model: Classifier | None

    def publish(self, plan: Plan, validation: Images, storage: Storage) -> None:
        """Make it an artifact, which workers elsewhere can read. plan: with `facts`."""
        base = plan.pool_plan.given_base
        assert base is not None
        if self.model is not None:
            accuracy = _accuracy(self.model, validation) if self.facts.accuracy is None else self.facts.accuracy
            facts = {"weights_given": self.facts.weights}
            publish_member(storage, plan, base, self.model, accuracy=accuracy, check_accuracy=accuracy, facts=facts)


def read_given(plan: Plan, validation: Images, storage: Storage) -> GivenBase | None:
    """The model of `pool.base`, None where there is none; for `generation: auto` with its accuracy.

    Raises InputError where its weights do not fit the architecture, or its outputs stand for other classes.
    """
    base, auto = plan.recipe.pool.base, plan.recipe.pool.generation == "auto"
    if base.weights is None:
        return None
    weights = read_weights(base.weights, KEY)
    _check_classes(base, weights, plan.data.classes)
    facts = Given(weights.sha256)
    member = replace(plan, given=facts).pool_plan.given_base
    assert member is not None
    if storage.has("member", member.fingerprint):
        accuracy = storage.open("member", member.fingerprint).manifest["validation_accuracy"]
        return GivenBase(replace(facts, accuracy=accuracy), None)
    try:
        model = build_for(plan, member.architecture)
    except ValueError as error:
        raise InputError([Problem("pool.base", member.architecture, str(error))]) from None
    load_into(model, weights, key=KEY, uri=base.weights)
    freeze(model)
    return GivenBase(replace(facts, accuracy=_accuracy(model, validation) if auto else None), model)


def _check_classes(base: BasePart, weights: Weights, wanted: Sequence[str]) -> None:
    if base.classes is None and weights.classes is None:
        remedy = (
            "the file names no classes: list those of its outputs, in their order, or write as_data where they are "
            "those of the data in the data's order"
        )
        raise InputError([Problem("pool.base.classes", None, remedy)])
    if weights.classes is not None:
        check_classes(KEY, weights.classes, wanted)
    if isinstance(base.classes, tuple):
        check_classes("pool.base.classes", base.classes, wanted)


def _accuracy(model: Classifier, validation: Images) -> float:
    spread = np.linspace(0, len(validation) - 1, min(len(validation), GIVEN_IMAGES)).astype(np.intp)
    sample = Labelled(lambda parts: (validation.read(part) for part in parts), validation.labels)
    return measure(model, sample, spread, torch.device("cpu"))
