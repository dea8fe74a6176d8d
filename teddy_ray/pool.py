"""The training of the pool's models: bases from their first weights, pruned copies of a trained one from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.data_parallel import Group
from teddy_ray.pixels import from_pixels
from teddy_ray.pool_plan import Training
from teddy_ray.randomness import generator
from teddy_ray.recipe import Pool
from teddy_ray.training import Batch, State, accuracy, cut_into_batches, fit, num_batches

Read = Callable[[Iterable[npt.NDArray[np.intp]]], Iterator[npt.NDArray[np.uint8]]]
"""Positions of images, batch by batch -> the images, (n c h w) uint8 each."""

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Labelled:
    """Images that are read when they are asked for, with their labels (n,)."""

    read: Read
    labels: npt.NDArray[np.int64]

    def batches(self, rows: npt.NDArray[np.intp], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at `rows` in order, with their labels, for measuring."""
        parts = np.array_split(rows, num_batches(len(rows), EVALUATION_BATCH))
        for part, images in zip(parts, self.read(parts), strict=True):
            yield from_pixels(images, device), torch.from_numpy(self.labels[part]).to(device)


def train(
    state: State,
    training: Training,
    data: Labelled,
    pool: Pool,
    *,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    group: Group = Group(),  # noqa: B008 - frozen
) -> Iterator[State]:
    """Train on from `state`, in place, and yield it after each epoch.

    The order of the images, their crops and what the model draws follow from the training's name and the epoch
    alone. Raises FloatingPointError where a loss is not finite.
    """
    steps = num_batches(len(data.labels), pool.batch_size)

    def batches(epoch: int) -> Iterator[Batch]:
        random = generator("base", training.name, epoch)
        order = random.permutation(len(data.labels))
        boxes = draw_boxes(pool.augmentation, random, len(order))
        whole = cut_into_batches(order, pool.batch_size)
        parts = [group.part_of(rows) for rows in whole]
        for rows, part, images in zip(whole, parts, data.read(parts), strict=True):
            labels = torch.from_numpy(data.labels[part]).to(device)
            views = apply_boxes(from_pixels(images, device), boxes[part])
            yield Batch(views, functional.one_hot(labels, num_classes).to(views.dtype), len(rows))

    yield from fit(
        state,
        batches,
        key=("base", training.name),
        epochs=training.epochs,
        steps_per_epoch=steps,
        learning_rate=training.learning_rate,
        warmup_epochs=training.warmup_epochs,
        dtype=dtype,
        group=group,
    )


def recalibrated(model: nn.Module, data: Labelled, pool: Pool, device: torch.device) -> nn.Module:
    """A copy whose BatchNorms hold the mean, over batches, of the statistics of one view of every image.

    What training leaves is a running average over weights that still moved.
    """
    model = copy.deepcopy(model)
    random = generator("recalibrate")
    torch.manual_seed(int(random.integers(2**63)))  # for models that draw
    boxes = draw_boxes(pool.augmentation, random, len(data.labels))
    parts = cut_into_batches(random.permutation(len(data.labels)), EVALUATION_BATCH)
    views = (
        apply_boxes(from_pixels(images, device), boxes[rows])
        for rows, images in zip(parts, data.read(parts), strict=True)
    )
    torch.optim.swa_utils.update_bn(views, model)
    return model


def measure(model: nn.Module, data: Labelled, rows: npt.NDArray[np.intp], device: torch.device) -> float:
    """The model's accuracy on the images at `rows`."""
    return accuracy(model, data.batches(rows, device))
