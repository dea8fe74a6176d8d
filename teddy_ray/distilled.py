"""`teddy_ray.load`: a published set as a PyTorch data set, which replays the labelled views."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from teddy_ray.dataset import FACTS, LabelledImages, concatenate
from teddy_ray.errors import InputError, Problem
from teddy_ray.published import check_set, set_path
from teddy_ray.replay import Ensemble, TrainingSet
from teddy_ray.storage import Storage
from teddy_ray.views import ViewedImages, Views

CPU = torch.device("cpu")


@dataclass(frozen=True, repr=False)
class DistilledSet(Dataset[tuple[Tensor, Tensor, int]]):
    """The images of a set as one epoch sees them.

    data[i] is (view, target, label): the view that the epoch has of image i, (c h w) float32 in [0, 1], the pixels that
    were labelled to the bit; its soft label, (classes,) float32, probabilities at `temperature`; and its class, an
    index into `classes`. `at(epoch)` is the set in another epoch: views come in turn, from the first again after the
    last of `num_views`.

    facts: what teddy.json says. training: images, views and labels as they are stored, which may be logits.
    """

    facts: dict[str, Any]
    training: TrainingSet
    epoch: int = 1

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.facts["classes"])

    @property
    def temperature(self) -> float:
        """tau of the soft labels, and of the loss that they are for."""
        return float(self.facts["labels"]["temperature"])

    @property
    def num_views(self) -> int | None:
        """Views of each image; None where every epoch has views of its own."""
        return self.training.num_views

    def __repr__(self) -> str:
        views = f"{self.num_views} views" if self.num_views else "a view for every epoch"
        return f"DistilledSet({len(self)} images of {len(self.classes)} classes, {views}, epoch {self.epoch})"

    def at(self, epoch: int) -> DistilledSet:
        """The set as epoch 1, 2, ... sees it. Shares its memory with this one."""
        epoch = operator.index(epoch)
        if epoch < 1:
            raise ValueError(f"epochs count from 1, not {epoch}")
        return replace(self, epoch=epoch)

    def __len__(self) -> int:
        return len(self.training)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # what ends a loop over the set
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor, int]]:
        """Many at once, which is how a DataLoader asks."""
        rows = np.asarray(indices, dtype=np.intp)
        views, targets, _ = self.training.batch(rows, self.epoch, CPU)
        if self.facts["labels"]["ensemble"] == "logits":
            targets = (targets / self.temperature).softmax(1)
        return list(zip(views, targets, self.training.labels[rows].tolist(), strict=True))


def load(path: str, *, trust_code: bool = False) -> DistilledSet:
    """Read the published set, or that of the run, at a path or URI, after every check that `teddy-ray check` makes.

    trust_code: of a set without stored labels, whose members' architectures are functions of modules: import them.
    Raises InputError (a ValueError) with every problem found.
    """
    files: list[LabelledImages] = []
    facts = check_set(path, files.append)
    rows, labels, views = concatenate(files), facts["labels"], facts["views"]
    viewed = ViewedImages(
        rows.images,
        Views(
            seed=views["seed"],
            set_key=views["set_key"],
            ids=rows.ids,
            augmentation=SimpleNamespace(**views["augmentation"]),
            cutmix=views["cutmix"],
            formation=views["formation"],
        ),
    )
    own_views = labels["mode"] == "none" or labels["averaged"]
    soft = rows.soft_labels or Ensemble(_members(path, facts, trust_code), labels["temperature"], labels["ensemble"])
    num_views = None if own_views else labels["num_views"]
    return DistilledSet(facts, TrainingSet(viewed, rows.labels, len(facts["classes"]), num_views, soft))


def _members(path: str, facts: dict[str, Any], trust_code: bool) -> list[nn.Module]:
    """The published members of a set without stored labels."""
    from safetensors.torch import load as load_tensors

    from teddy_ray.models import build, code_identity, freeze, is_users  # models are needed for such sets alone
    from teddy_ray.pruning import reshape

    folder, models = Storage(set_path(path)), []
    for member in facts["members"]:
        name, key = member["architecture"], f"{folder.display(FACTS)}, architecture of {member['file']}"
        if is_users(name) and not trust_code:
            remedy = "would be imported and run; load(path, trust_code=True) if you have its module and trust it"
            raise InputError([Problem(key, name, remedy)])
        try:
            if code_identity(name) != member["code"]:
                raise ValueError("its code has changed since the set was made")
            model = build(
                name,
                num_classes=len(facts["classes"]),
                channels=facts["channels"],
                image_size=facts["image_size"],
                mean=member["mean"],
                std=member["std"],
            )
            model = reshape(model, member["structure"], load_tensors(folder.read(member["file"])))
        except ValueError as error:
            raise InputError([Problem(key, name, f"cannot be built ({error})")]) from None
        models.append(freeze(model))
    return models
