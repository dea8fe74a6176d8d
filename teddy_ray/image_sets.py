"""The small sets of images of a plan: distilled, random, starting ones; labelled, and cut into files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from teddy_ray.fingerprints import fingerprint
from teddy_ray.pool_plan import Member
from teddy_ray.recipe import LabelMembers, Recipe, result_fields
from teddy_ray.rows import Kind


@dataclass(frozen=True)
class ImageSet:
    """A small set of images, as many of each class as the recipe distils.

    draw: seed of a random draw, else None. formation: its images hold so many along each side.
    """

    kind: Kind
    draw: int | None
    fingerprint: str
    formation: int = 1

    @property
    def name(self) -> str:
        return {"distilled": "distilled", "start": "starting images", "random": f"random draw {self.draw}"}[self.kind]


@dataclass(frozen=True)
class LabelledSet:
    """A set with its soft labels. plain: of the images as they are, not of augmented views of them."""

    images: ImageSet
    plain: bool
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.images.name}, plain" if self.plain else self.images.name


@dataclass(frozen=True)
class Shard:
    """A file of a labelled set: a range of its rows."""

    set_name: str
    rows: range
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.set_name} rows {self.rows[0]}-{self.rows[-1]}"


def start_fingerprint(recipe: Recipe, train: str, pool: str) -> str:
    """Of the images that the synthesis starts from. train, pool: fingerprints of the training data and the pool."""
    part = recipe.synthesis
    parts: dict[str, Any] = {"start": part.start, "per_class": part.images_per_class, "seed": recipe.seed}
    if part.start == "mosaic":
        views = result_fields(part.augmentation)
        parts |= {"mosaic": result_fields(part.mosaic), "augmentation": views, "pool": pool, "threads": part.threads}
    if part.formation > 1:
        parts["formation"] = part.formation
    if part.start != "real":
        parts |= {"units": [part.classes_per_unit, part.slots_per_unit]}  # made unit by unit
    return fingerprint("set", train=train, **parts)


def random_fingerprint(recipe: Recipe, train: str, draw: int) -> str:
    """Of a random draw of real images."""
    return fingerprint("set", random=draw, per_class=recipe.synthesis.images_per_class, train=train)


def labelled_fingerprint(recipe: Recipe, images: ImageSet, members: Iterable[Member], *, plain: bool) -> str:
    """Of a set with the soft labels that the members give it."""
    fields = result_fields(recipe.labels)
    del fields["members"]  # it is their fingerprints that count
    unused = [] if recipe.labels.mode == "top_k" else ["top_k"]
    if recipe.labels.mode == "none":
        unused += ["views", "averaged", "batch_size", "kernels", "precision"]
    if plain:
        unused += ["views", "averaged", "augmentation", "cutmix"]
    return fingerprint(
        "labels",
        fields={key: value for key, value in fields.items() if key not in unused},
        plain=plain,
        seed=recipe.seed,
        members=[member.fingerprint for member in members],
        images=images.fingerprint,
    )


def is_chosen(member: Member, choice: Literal["all"] | LabelMembers) -> bool:
    """Whether `labels.members` lets a member label."""
    if choice == "all":
        return True
    lists = (
        (member.architecture, choice.architectures),
        (member.seed, choice.seeds),
        (member.epoch, choice.epochs),
        (member.ratio, choice.ratios),
    )
    return all(allowed is None or value in allowed for value, allowed in lists)
