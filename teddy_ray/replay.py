"""What a student learns from: the views that were labelled, bit for bit, each with its label."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teddy_ray.labels import Quantity, Stored, ensemble
from teddy_ray.views import Rows, ViewedImages


class Example(NamedTuple):
    """A batch. views: (n c h w) in [0, 1]. targets: (n classes), soft labels, or the hard ones where there are none.
    hard: (n classes), one-hot, mixed where the view is."""

    views: Tensor
    targets: Tensor
    hard: Tensor


@dataclass(frozen=True)
class Ensemble:
    """The members, asked while a student trains."""

    models: Sequence[nn.Module]
    temperature: float
    quantity: Quantity = "probabilities"

    def __call__(self, views: Tensor) -> Tensor:
        """(n c h w) -> (n classes), on the views' device, wherever the members are."""
        home = next((weight.device for model in self.models for weight in model.parameters()), views.device)
        return ensemble(self.models, views.to(home), self.temperature, self.quantity).to(views.device)


@dataclass(frozen=True)
class TrainingSet:
    """Images with their views and labels.

    labels: (n,) class indices. soft: stored labels, the ensemble to ask, or None where hard labels are trained on.
    num_views: views that the epochs take in turn, from the first again after the last; None: as many as epochs.
    """

    viewed: ViewedImages
    labels: npt.NDArray[np.int64]
    num_classes: int
    num_views: int | None
    soft: Stored | Ensemble | None

    def __len__(self) -> int:
        return len(self.labels)

    def view_of(self, epoch: int) -> int:
        """The view that epoch 1, 2, ... sees."""
        epoch = operator.index(epoch)
        return (epoch - 1) % (self.num_views or epoch)

    def batch(self, rows: Rows, epoch: int, device: torch.device) -> Example:
        """The images at `rows` as an epoch sees them."""
        view = self.view_of(epoch)
        views = self.viewed.view(rows, view, device)
        hard = self._hard(rows, view, device)
        if self.soft is None:
            return Example(views, hard, hard)
        if isinstance(self.soft, Ensemble):
            return Example(views, self.soft(views), hard)
        targets = self.soft.of(rows, view % self.soft.num_views)
        return Example(views, torch.from_numpy(targets).to(device), hard)

    def _hard(self, rows: Rows, view: int, device: torch.device) -> Tensor:
        targets = np.zeros((len(rows), self.num_classes), dtype=np.float32)
        each, mixes = np.arange(len(rows)), self.viewed.mixes(rows, view)
        share = mixes.shares(self.viewed.size) if mixes else np.zeros(len(rows))
        targets[each, self.labels[rows]] = 1 - share
        if mixes:
            targets[each, self.labels[mixes.partners]] += share
        return torch.from_numpy(targets).to(device)
