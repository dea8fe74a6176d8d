"""The images that stages work on: real ones drawn, what a unit starts from, and the rows of a set, read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load
from torch import nn

from teddy_ray.formation import shrink
from teddy_ray.image_sets import ImageSet
from teddy_ray.plan import Plan, Unit
from teddy_ray.randomness import generator
from teddy_ray.sources import Images, Source
from teddy_ray.starts import mosaic_start, noise_start
from teddy_ray.storage import Storage

Pixels = npt.NDArray[np.uint8]

FINISHED, START = "images.safetensors", "start.safetensors"
"""Files of a unit, each with one tensor `images`, (n c h w) uint8, ordered by class, then slot."""


def read_set(plan: Plan, source: Source, storage: Storage, images: ImageSet, rows: range) -> Pixels:
    """The 8-bit images of some rows of a set, (n c h w). Rows are ordered by class, then slot."""
    if images.draw is None:
        return _read_units(plan, storage, FINISHED if images.kind == "distilled" else START, rows)
    per_class = plan.recipe.synthesis.images_per_class
    classes = _classes_of(rows, per_class)
    draws = [draw_real(source.train, label, per_class, "random", images.draw) for label in classes]
    offset = classes.start * per_class
    return source.train.read(np.concatenate(draws)[rows.start - offset : rows.stop - offset])


def _read_units(plan: Plan, storage: Storage, file: str, rows: range) -> Pixels:
    per_class = plan.recipe.synthesis.images_per_class
    classes = _classes_of(rows, per_class)
    channels, size = plan.recipe.data.channels, plan.recipe.data.image_size
    pixels = np.empty((len(classes), per_class, channels, size, size), dtype=np.uint8)
    for unit in plan.units():
        both = range(max(unit.classes.start, classes.start), min(unit.classes.stop, classes.stop))
        if not both:
            continue
        block = load(storage.open("unit", unit.fingerprint).read(file))["images"]
        block = block.reshape(len(unit.classes), len(unit.slots), *block.shape[1:])
        target = pixels[both.start - classes.start : both.stop - classes.start, unit.slots.start : unit.slots.stop]
        target[:] = block[both.start - unit.classes.start : both.stop - unit.classes.start]
    offset = classes.start * per_class
    return pixels.reshape(-1, channels, size, size)[rows.start - offset : rows.stop - offset]


def _classes_of(rows: range, per_class: int) -> range:
    return range(rows[0] // per_class, rows[-1] // per_class + 1)


def draw_real(images: Images, label: int, num: int, *key: str | int) -> npt.NDArray[np.intp]:
    """Positions of `num` random images of a class; a longer draw starts with the shorter one."""
    return generator(*key, images.classes[label]).permutation(images.of_class(label))[:num]


def make_start(plan: Plan, train: Images, unit: Unit, models: Sequence[nn.Module], device: torch.device) -> Pixels:
    """What a unit starts from, (n c h w), ordered by class, then slot. models: the members, which choose mosaics."""
    recipe = plan.recipe
    if recipe.synthesis.start == "noise":
        key: tuple[Any, ...] = (recipe.seed, unit.name)
        return noise_start(unit.num_images, recipe.data.channels, recipe.data.image_size, key)
    if recipe.synthesis.start == "mosaic":
        return np.concatenate([_mosaics(plan, train, label, unit.slots, models, device) for label in unit.classes])
    each = recipe.synthesis.formation**2
    num, first = (unit.slots[-1] + 1) * each, unit.slots[0] * each
    rows = [draw_real(train, label, num, "start", recipe.seed)[first:] for label in unit.classes]
    return shrink(train.read(np.concatenate(rows)), recipe.synthesis.formation)


def _mosaics(
    plan: Plan, train: Images, label: int, slots: range, models: Sequence[nn.Module], device: torch.device
) -> Pixels:
    recipe = plan.recipe
    part = recipe.synthesis.mosaic
    order = draw_real(train, label, len(train), "start", recipe.seed)
    num = part.grid**2 * part.candidates
    # each slot its own stretch of the class's images, from the first again after the last
    rows = np.take(order, np.arange(slots.start * num, slots.stop * num), mode="wrap")
    keys = [(recipe.seed, train.classes[label], slot) for slot in slots]
    return mosaic_start(train.read(rows), label, models, part, recipe.synthesis.augmentation, keys=keys, device=device)
