"""What the pool of a recipe comes to: which generation, and every training with the members that are kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from teddy_ray.fingerprints import fingerprint
from teddy_ray.recipe import Recipe, result_fields


@dataclass(frozen=True)
class DataFacts:
    """What planning needs of the data. Identities are hashes of content; counts are training images per class, without
    the validation part; num_skipped images could not be decoded and are left out."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    num_test: int
    train: str
    validation: str
    test: str
    num_skipped: int = 0
    num_validation: int = 0


@dataclass(frozen=True)
class Given:
    """What planning needs of `pool.base`: the hash of its weights, and how often it is right on validation images.

    accuracy: None where nobody has asked: it decides `generation: auto` alone.
    """

    weights: str
    accuracy: float | None = None


@dataclass(frozen=True)
class Member:
    """A model with weights of its own: of the pool, or one that a training starts from.

    seed: of its last training; of a fine-tuning, its place among the ratios. ratio: share of channels pruned from it.
    epoch: after which it was kept; 0 for a model that was given.
    """

    name: str
    architecture: str
    seed: int
    ratio: float
    epoch: int
    fingerprint: str


@dataclass(frozen=True)
class Training:
    """A run of training: of a base from its first weights, or of a pruned copy of a trained one.

    start: what it starts from, None for weights drawn anew. members: what is kept of it, by rising epoch; the last
    one ends it. fingerprint identifies its course, whatever is kept of it.
    """

    name: str
    architecture: str
    seed: int
    start: Member | None
    ratio: float
    learning_rate: float
    warmup_epochs: int
    members: tuple[Member, ...]
    fingerprint: str

    @property
    def epochs(self) -> int:
        return self.members[-1].epoch


@dataclass(frozen=True)
class PoolPlan:
    """The pool of a recipe on given data."""

    recipe: Recipe
    data: DataFacts
    given: Given | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    """Hash of the source of each architecture that is the user's own function."""

    @property
    def generation(self) -> Literal["prior", "post"]:
        """Algorithm 1: a prior pool from a random or early base, a post pool from a well trained one."""
        asked = self.recipe.pool.generation
        if asked != "auto":
            return asked
        return "post" if self.given is not None and self._progress >= self.recipe.pool.base.well_trained else "prior"

    @property
    def generation_reason(self) -> str:
        """Why it is this generation."""
        if self.recipe.pool.generation != "auto":
            return "the recipe asks for it"
        if self.given is None:
            return "no base is given, and a random one is early"
        chance, needed = 1 / len(self.data.classes), self.recipe.pool.base.well_trained
        return (
            f"the base's validation accuracy of {self.given.accuracy:.4f} is {self._progress:.0%} of the way from "
            f"chance, {chance:.4f}, to perfect; well trained is {needed:.0%} or more (pool.base.well_trained)"
        )

    @property
    def _progress(self) -> float:
        assert self.given is not None and self.given.accuracy is not None, "auto needs the base's accuracy"  # noqa: PT018
        chance = 1 / len(self.data.classes)
        return (self.given.accuracy - chance) / (1 - chance)

    @cached_property
    def given_base(self) -> Member | None:
        """The model of pool.base."""
        if self.given is None:
            return None
        pool = self.recipe.pool
        (architecture,) = pool.architectures
        base = {"mean": pool.base.mean, "std": pool.base.std, "classes": self.data.classes}
        identity = fingerprint(
            "member",
            weights=self.given.weights,
            base=base,
            architecture=architecture,
            code=self.code.get(architecture),
            validation=self.data.validation,
        )
        return Member(f"{architecture}/given", architecture, 0, 0.0, 0, identity)

    @cached_property
    def bases(self) -> tuple[Training, ...]:
        """The trajectories: of a prior pool all its members, of a post pool what is pruned, unless that is given."""
        pool = self.recipe.pool
        if self.generation == "post" and self.given is not None:
            return ()
        # kept to be pruned, a base stays as training left it
        recalibrate = pool.recalibrate and self.generation == "prior"
        return tuple(
            self._training(
                name=f"{architecture}/seed{seed}",
                architecture=architecture,
                seed=seed,
                start=self.given_base,
                ratio=0.0,
                learning_rate=pool.learning_rate,
                warmup_epochs=1,
                epochs=pool.snapshots,  # for a post pool, too: the same training then serves a prior pool
                recalibrate=recalibrate,
            )
            for architecture in pool.architectures
            for seed in pool.seeds
        )

    @cached_property
    def finetunings(self) -> tuple[Training, ...]:
        """Of a post pool, the training of each member from its pruned base."""
        if self.generation == "prior":
            return ()
        pool, post = self.recipe.pool, self.recipe.pool.post
        if self.given_base is not None:
            trained = [(f"{self.given_base.name}/seed{seed}", self.given_base) for seed in pool.seeds]
        else:
            trained = [(base.name, base.members[-1]) for base in self.bases]
        return tuple(
            self._training(
                name=f"{name}/pruned{place}-{ratio:g}",
                architecture=base.architecture,
                seed=place,
                start=base,
                ratio=ratio,
                learning_rate=post.learning_rate,
                warmup_epochs=0,
                epochs=(post.epochs,),
                recalibrate=pool.recalibrate,
            )
            for name, base in trained
            for place, ratio in enumerate(post.ratios)
        )

    def _training(
        self,
        *,
        name: str,
        architecture: str,
        seed: int,
        start: Member | None,
        ratio: float,
        learning_rate: float,
        warmup_epochs: int,
        epochs: tuple[int, ...],
        recalibrate: bool,
    ) -> Training:
        pool = self.recipe.pool
        identity = fingerprint(
            "training",
            name=name,  # which all draws follow
            architecture=architecture,
            code=self.code.get(architecture),
            seed=seed,
            start=start.fingerprint if start else None,
            ratio=ratio,
            learning_rate=learning_rate,
            warmup_epochs=warmup_epochs,
            epochs=epochs[-1],
            batch_size=pool.batch_size,
            weight_decay=pool.weight_decay,
            augmentation=result_fields(pool.augmentation),
            precision=pool.precision,
            workers=pool.workers_per_base,
            threads=pool.threads,
            train=self.data.train,
            validation=self.data.validation,
        )
        members = tuple(
            Member(
                name=f"{name}/epoch{epoch}",
                architecture=architecture,
                seed=seed,
                ratio=ratio,
                epoch=epoch,
                fingerprint=fingerprint("member", training=identity, epoch=epoch, recalibrate=recalibrate),
            )
            for epoch in epochs
        )
        return Training(name, architecture, seed, start, ratio, learning_rate, warmup_epochs, members, identity)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        trainings = self.bases if self.generation == "prior" else self.finetunings
        return tuple(member for training in trainings for member in training.members)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("pool", members=[member.fingerprint for member in self.members])
