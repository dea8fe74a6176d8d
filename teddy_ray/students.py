"""Students: models trained from scratch on a small set, whose accuracy says what the set is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from teddy_ray.models import build
from teddy_ray.pixels import from_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Evaluation
from teddy_ray.replay import TrainingSet
from teddy_ray.training import Batch, State, accuracy, cut_into_batches, fit, num_batches

TEST_BATCH = 500


def train_student(
    training: TrainingSet,
    evaluation: Evaluation,
    *,
    architecture: str,
    seed: int,
    epochs: int,
    learning_rate: float,
    temperature: float,
    device: torch.device,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Module:
    """Train one student and return it as it is after the last epoch."""
    _, channels, image_size, _ = training.viewed.images.shape
    model = build(
        architecture, num_classes=training.num_classes, channels=channels, image_size=image_size, seed=seed
    ).to(device)

    def batches(epoch: int) -> Iterator[Batch]:
        order = generator("student", seed, epoch).permutation(len(training))
        for rows in cut_into_batches(order, evaluation.batch_size):
            views, targets, _ = training.batch(rows, epoch, device)
            yield Batch(views, targets, len(rows))

    for state in fit(
        State.begin(model, evaluation.weight_decay),
        batches,
        key=("student", architecture, seed),
        epochs=epochs,
        steps_per_epoch=num_batches(len(training), evaluation.batch_size),
        learning_rate=learning_rate,
        temperature=temperature,
    ):
        on_epoch(state.epoch, state.losses[-1])
    return model


def measure(
    model: nn.Module, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], device: torch.device
) -> float:
    """The model's accuracy on images (n c h w) with labels (n,)."""
    splits = (np.array_split(part, num_batches(len(labels), TEST_BATCH)) for part in (images, labels))
    return accuracy(
        model, ((from_pixels(x, device), torch.from_numpy(y).to(device)) for x, y in zip(*splits, strict=True))
    )
