"""Students: models trained from scratch on a small set, whose accuracy says what the set is worth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import one_hot

from teddy_ray import schedules
from teddy_ray.augment import Boxes, apply_boxes
from teddy_ray.models import build
from teddy_ray.pixels import from_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Evaluation
from teddy_ray.training import (
    Batch,
    Loss,
    State,
    accuracy,
    cut_into_batches,
    fit,
    logit_error,
    num_batches,
    running_average,
    soft_cross_entropy,
    with_hard_labels,
)

TEST_BATCH = 500


@dataclass(frozen=True)
class TrainingSet:
    """What a student learns from.

    images: (n c h w) uint8. boxes: (n views 5). targets: (n views classes) for a label per view, or (n 1 classes)
    for one label per image: probabilities, or logits where the loss compares those. classes: (n,), for a loss that
    takes hard labels beside soft ones.
    """

    images: npt.NDArray[np.uint8]
    boxes: Boxes
    targets: npt.NDArray[np.floating]
    classes: npt.NDArray[np.int64] | None = None

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
    labels: Literal["soft", "hard"],
    temperature: float,
    device: torch.device,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Train one student and return its accuracy on `test` after the last epoch. temperature: of soft labels."""
    _, channels, image_size, _ = training.images.shape
    num_classes = training.targets.shape[2]
    model = build(architecture, num_classes=num_classes, channels=channels, image_size=image_size, seed=seed).to(device)
    images = from_pixels(training.images, device)

    def batches(epoch: int) -> Iterator[Batch]:
        boxes, of_view = training.view(epoch)
        targets = torch.from_numpy(of_view.astype(np.float32)).to(device)
        order = generator("student", seed, epoch).permutation(len(images))
        for rows in cut_into_batches(order, evaluation.batch_size):
            index = torch.from_numpy(rows).to(device)
            hard = None
            if training.classes is not None:
                hard = one_hot(torch.from_numpy(training.classes[rows]), num_classes).to(targets)
            yield Batch(apply_boxes(images[index], boxes[rows]), targets[index], len(rows), hard)

    state = begin(model, evaluation)
    for _ in fit(
        state,
        batches,
        key=("student", architecture, seed),
        epochs=epochs,
        steps_per_epoch=num_batches(len(images), evaluation.batch_size),
        learning_rate=evaluation.learning_rate,
        loss=loss_of(evaluation, labels, temperature),
        schedule=schedules.of_students(evaluation),
        warmup_epochs=evaluation.warmup_epochs,
    ):
        on_epoch(state.epoch, state.losses[-1])
    splits = (np.array_split(part, num_batches(len(test[1]), TEST_BATCH)) for part in test)
    return accuracy(
        state.measured, ((from_pixels(x, device), torch.from_numpy(y).to(device)) for x, y in zip(*splits, strict=True))
    )


def begin(model: nn.Module, evaluation: Evaluation) -> State:
    """A training at its start, with the recipe's optimiser and average."""
    weights, decay = model.parameters(), evaluation.weight_decay
    optimiser: torch.optim.Optimizer
    if evaluation.optimiser == "sgd":
        optimiser = torch.optim.SGD(weights, momentum=evaluation.momentum, weight_decay=decay)
    else:
        optimiser = torch.optim.AdamW(weights, weight_decay=decay)
    return State(model, optimiser, average=running_average(model, evaluation.ema) if evaluation.ema else None)


def loss_of(evaluation: Evaluation, labels: Literal["soft", "hard"], temperature: float) -> Loss:
    """What a student lowers."""
    if labels == "hard":
        return soft_cross_entropy
    losses: dict[str, Loss] = {
        "kl": functools.partial(soft_cross_entropy, temperature=temperature),
        "logit_mse": logit_error,
    }
    soft = losses[evaluation.loss]
    return with_hard_labels(soft, evaluation.ce_weight) if evaluation.ce_weight else soft
