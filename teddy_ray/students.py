"""Students: models trained from scratch on a small set, whose accuracy says what the set is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teddy_ray.augment import Boxes, apply_boxes
from teddy_ray.models import build
from teddy_ray.pixels import from_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Evaluation
from teddy_ray.training import accuracy, cut_into_batches, fit, num_batches


@dataclass(frozen=True)
class TrainingSet:
    """What a student learns from.

    images: (n c h w) uint8. boxes: (n views 5). targets: (n views classes) for a label per view, or (n 1 classes)
    for one label per image.
    """

    images: npt.NDArray[np.uint8]
    boxes: Boxes
    targets: npt.NDArray[np.floating]

    def view(self, epoch: int) -> tuple[Boxes, npt.NDArray[np.floating]]:
        """Boxes and targets of epoch 1, 2, ...: the views in order, then from the first again."""
        num_views = self.boxes.shape[1]
        return self.boxes[:, (epoch - 1) % num_views], self.targets[:, (epoch - 1) % self.targets.shape[1]]


def train_student(
    training: TrainingSet,
    test: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    evaluation: Evaluation,
    *,
    architecture: str,
    seed: int,
    epochs: int,
    temperature: float,
    device: torch.device,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Train one student and return its accuracy on `test` after the last epoch."""
    _, channels, image_size, _ = training.images.shape
    num_classes = training.targets.shape[2]
    model = build(architecture, num_classes=num_classes, channels=channels, image_size=image_size, seed=seed).to(device)
    images = from_pixels(training.images, device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        boxes, labels = training.view(epoch)
        targets = torch.from_numpy(labels.astype(np.float32)).to(device)
        order = generator("student", seed, epoch).permutation(len(images))
        for rows in cut_into_batches(order, evaluation.batch_size):
            index = torch.from_numpy(rows).to(device)
            yield apply_boxes(images[index], boxes[rows]), targets[index]

    fit(
        model,
        batches,
        epochs=epochs,
        steps_per_epoch=num_batches(len(images), evaluation.batch_size),
        learning_rate=evaluation.learning_rate,
        weight_decay=evaluation.weight_decay,
        temperature=temperature,
        seed=seed,
        on_epoch=on_epoch,
    )
    return accuracy(model, from_pixels(test[0], device), torch.from_numpy(test[1]).to(device))
