"""The rows of the table of accuracies: what each one's students learn from, and what its n counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["distilled", "start", "random"]
"""Of small sets of images: the distilled ones, what their synthesis started from, random real images."""


@dataclass(frozen=True, kw_only=True)
class RowKind:
    """A row. images: None for the whole training set. plain: every image as it is, without augmentation."""

    title: str
    images: Kind | None
    labels: Literal["soft", "hard"]
    plain: bool = False

    @property
    def n_counts(self) -> str:
        """What the n students of the row are independent draws of."""
        if self.images is None:
            return "student seeds"
        return "random draws, one student each" if self.images == "random" else "student seeds on one set"


ROWS: Mapping[str, RowKind] = {
    "distilled": RowKind(title="distilled", images="distilled", labels="soft"),
    "random_soft": RowKind(title="random real images, same soft labels", images="random", labels="soft"),
    "start_soft": RowKind(title="images before synthesis, same soft labels", images="start", labels="soft"),
    "distilled_hard": RowKind(title="distilled, hard labels", images="distilled", labels="hard"),
    "random_hard": RowKind(title="random real images, hard labels", images="random", labels="hard"),
    "start_hard": RowKind(title="images before synthesis, hard labels", images="start", labels="hard"),
    "distilled_plain": RowKind(title="distilled, no augmentation", images="distilled", labels="soft", plain=True),
    "random_plain": RowKind(title="random real images, no augmentation", images="random", labels="soft", plain=True),
    "full_data": RowKind(title="whole training set, hard labels", images=None, labels="hard"),
}
"""In the order of the table. All but the first are controls."""
