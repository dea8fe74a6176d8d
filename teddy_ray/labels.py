"""Soft labels: what the ensemble says of a view, and the forms in which that is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Rows = npt.NDArray[np.intp]
Quantity = Literal["probabilities", "logits"]


@torch.no_grad()
def ensemble(models: Sequence[nn.Module], views: Tensor, temperature: float, quantity: Quantity) -> Tensor:
    """Y = 1/|M| sum softmax(logits / tau), or the mean of the logits. views: (n c h w). Returns (n classes) float32,
    whatever the models compute in."""
    outputs = [model(views).float() for model in models]
    if quantity == "probabilities":
        outputs = [(logits / temperature).softmax(1) for logits in outputs]
    return torch.stack(outputs).mean(0)


@dataclass(frozen=True)
class Dense:
    """Every class of every label. values: (n views classes) float16."""

    values: npt.NDArray[np.float16]

    @property
    def num_views(self) -> int:
        return int(self.values.shape[1])

    @property
    def num_classes(self) -> int:
        return int(self.values.shape[2])

    @property
    def mass_kept(self) -> float:
        """The share of the labels that is stored."""
        return 1.0

    def of(self, rows: Rows, view: int) -> npt.NDArray[np.float32]:
        """Labels of a view of the images at `rows`, (n classes)."""
        labels: npt.NDArray[np.float32] = self.values[rows, view].astype(np.float32)
        return labels


@dataclass(frozen=True)
class TopK:
    """The largest probabilities of every label. classes: (n views k) unsigned; values: (n views k) float16."""

    classes: npt.NDArray[np.unsignedinteger]
    values: npt.NDArray[np.float16]
    num_classes: int

    @property
    def num_views(self) -> int:
        return int(self.values.shape[1])

    @property
    def mass_kept(self) -> float:
        """The share of the labels that is stored."""
        return min(1.0, float(self.values.sum(2, dtype=np.float64).mean()))

    def of(self, rows: Rows, view: int) -> npt.NDArray[np.float32]:
        """Labels of a view of the images at `rows`, (n classes): what is left out is spread evenly over the others."""
        values, k = self.values[rows, view].astype(np.float32), self.values.shape[2]
        left = np.maximum(1 - values.sum(1, keepdims=True), 0) / max(1, self.num_classes - k)
        labels = np.repeat(left, self.num_classes, 1)
        np.put_along_axis(labels, self.classes[rows, view].astype(np.intp), values, 1)
        return labels


Stored = Dense | TopK


def store(labels: Tensor, top_k: int | None) -> Stored:
    """labels: (n views classes), whole or, of `top_k` classes, in part. Among equal ones the first classes are kept."""
    if top_k is None:
        return Dense(labels.half().cpu().numpy())
    num_classes = labels.shape[2]
    values, classes = labels.cpu().sort(dim=2, descending=True, stable=True)
    smallest = np.min_scalar_type(num_classes - 1)
    return TopK(classes[..., :top_k].numpy().astype(smallest), values[..., :top_k].half().numpy(), num_classes)


def join(parts: Sequence[Stored]) -> Stored:
    """The labels of several stretches of images, of one form, as one."""
    first = parts[0]
    if isinstance(first, Dense):
        return Dense(np.concatenate([part.values for part in parts]))
    tops = [part for part in parts if isinstance(part, TopK)]
    classes = np.concatenate([part.classes for part in tops])
    return TopK(classes, np.concatenate([part.values for part in tops]), first.num_classes)


def label_views(
    label: Callable[[int], Tensor],
    num_views: int,
    *,
    averaged: bool,
    on_view: Callable[[int], None] = lambda num_done: None,
) -> Tensor:
    """Labels of every view of a batch, (n num_views classes), or of their mean, (n 1 classes).

    label: gives those of one view, (n classes). on_view: told after each view how many are labelled.
    """
    labels: list[Tensor] = []
    for view in range(num_views):
        labels.append(label(view).double() if averaged else label(view))
        if averaged and len(labels) == 2:
            labels = [labels[0] + labels[1]]
        on_view(view + 1)
    return (labels[0] / num_views).float()[:, None] if averaged else torch.stack(labels, 1)
