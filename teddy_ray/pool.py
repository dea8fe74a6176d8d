"""The prior pool: one base per architecture and seed, kept as it was after each listed epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.models import build
from teddy_ray.pixels import from_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Pool
from teddy_ray.training import accuracy, cut_into_batches, fit, num_batches


def train_base(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    validation: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    pool: Pool,
    *,
    architecture: str,
    seed: int,
    num_classes: int,
    device: torch.device,
    on_snapshot: Callable[[int, nn.Module, float], None],
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train one base from scratch, T_1 to T_e of the paper.

    images: (n c h w) uint8; labels: (n,). on_snapshot is called at each of pool.snapshots with the epoch, the
    model and its accuracy on the validation part.
    """
    _, channels, image_size, _ = images.shape
    model = build(architecture, num_classes=num_classes, channels=channels, image_size=image_size, seed=seed).to(device)
    data = from_pixels(images, device)
    targets = torch.eye(num_classes, device=device)[torch.from_numpy(labels).to(device)]
    held_out = from_pixels(validation[0], device), torch.from_numpy(validation[1]).to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        random = generator("base", architecture, seed, epoch)
        order = random.permutation(len(data))
        boxes = draw_boxes(pool.augmentation, random, len(data))
        for rows in cut_into_batches(order, pool.batch_size):
            index = torch.from_numpy(rows).to(device)
            yield apply_boxes(data[index], boxes[rows]), targets[index]

    def end_of_epoch(epoch: int, loss: float) -> None:
        if epoch in pool.snapshots:
            on_snapshot(epoch, model, accuracy(model, *held_out))
        on_epoch(epoch, loss)

    fit(
        model,
        batches,
        epochs=pool.snapshots[-1],
        steps_per_epoch=num_batches(len(data), pool.batch_size),
        learning_rate=pool.learning_rate,
        weight_decay=pool.weight_decay,
        warmup_epochs=1,
        on_epoch=end_of_epoch,
    )
